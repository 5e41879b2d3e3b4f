"""What type gradients are summed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import metrics

pytestmark = pytest.mark.numbers

Train = Callable[..., Path]

STEP: dict[str, Any] = {
    "precision": "bf16",
    "packing": False,
    "micro_batch_size": 1,
    "max_steps": 1,
}
"""Sixteen micro batches of a sample each, by one rank or by two: each one's gradient is the same in both."""
ROUNDED_ONCE = 1e-5
"""Sums of sixteen bf16 numbers in fp32 differ by their order alone, by some 2^-24 of themselves; in bf16 each
addition may round by 2^-9."""


def norms(trained: Train, stage: int, fp32_gradients: bool) -> list[float]:
    """Of the gradient, by the number of ranks."""
    changes = {**STEP, "stage": stage, "fp32_gradients": fp32_gradients}
    split = [(1, 16), (2, 8)]
    runs = [trained(**changes, processes=n, gradient_accumulation_steps=steps) for n, steps in split]
    return [metrics(output)[0]["gradNorm"] for output in runs]


@pytest.mark.parametrize("stage", [2, 3])
def test_fp32_gradients_are_summed_without_rounding_to_bf16(trained: Train, stage: int) -> None:
    one, two = norms(trained, stage, fp32_gradients=True)
    assert one == pytest.approx(two, rel=ROUNDED_ONCE)
    one, two = norms(trained, stage, fp32_gradients=False)
    assert one != pytest.approx(two, rel=ROUNDED_ONCE)
