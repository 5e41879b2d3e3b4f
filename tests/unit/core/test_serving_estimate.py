"""What serving needs, and the table of it in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from yuan2_core.estimate import GPUS, Shape
from yuan2_core.estimate.serving import Serving
from yuan2_core.presets import PRESETS

PAGE = Path(__file__).parents[3] / "docs/serving/engines.md"
ROW = re.compile(r"^\| (\w+B) \| (\d+) × ([\w-]+) \| (\d+) \| ([\d.]+) \| ([\d,]+) \|$", re.MULTILINE)


def serving(size: str, gpu: str, gpus: int = 1, bits: int = 16) -> Serving:
    return Serving(Shape.of(PRESETS[size]), GPUS[gpu], gpus, bits)


@pytest.mark.parametrize(("size", "published"), [("2B", 2.1e9), ("51B", 51e9), ("102B", 102e9)])
def test_weights_in_bf16_are_two_bytes_a_parameter(size, published):
    assert serving(size, "H100").weight_bytes == pytest.approx(2 * PRESETS[size].parameters, rel=0.001)
    assert serving(size, "H100").weight_bytes == pytest.approx(2 * published, rel=0.03)


def test_a_token_of_2b_takes_192_kib():
    assert serving("2B", "A10").token_bytes == 192 << 10


def test_what_does_not_fit_holds_no_token():
    assert serving("51B", "H100").cached_tokens == 0
    assert serving("51B", "H100", gpus=2).cached_tokens > 0
    assert serving("102B", "H100", bits=4).cached_tokens > 0


def test_the_table_of_the_page_is_computed():
    rows = ROW.findall(PAGE.read_text("utf-8"))
    assert {row[0] for row in rows} == set(PRESETS)
    for size, count, gpu, bits, weights, tokens in rows:
        found = serving(size, gpu, int(count), int(bits))
        assert f"{found.weight_bytes / 1e9:.1f}" == weights
        assert f"{found.cached_tokens:,}" == tokens
