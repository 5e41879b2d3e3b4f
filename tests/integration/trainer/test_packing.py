"""Packing changes how fast a step is: losses, gradients and weights are those of the samples alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training import losses, metrics

Train = Callable[..., Path]

TOLERANCE = 1e-5


@pytest.fixture
def alone(trained: Train) -> Path:
    """Each sample in a forward pass of its own."""
    return trained(packing=False, micro_batch_size=1, gradient_accumulation_steps=8)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (4, 2), (8, 1)])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_samples_alone(
    trained: Train, alone: Path, processes: int, micro: int, accumulation: int
) -> None:
    if processes == 2:
        micro, accumulation = max(1, micro // 2), accumulation if micro > 1 else accumulation // 2
    packed = trained(micro_batch_size=micro, gradient_accumulation_steps=accumulation, processes=processes)
    assert losses(packed) == pytest.approx(losses(alone), abs=TOLERANCE)
    norms = [[row["gradNorm"] for row in metrics(output)] for output in (packed, alone)]
    assert norms[0] == pytest.approx(norms[1], abs=TOLERANCE, rel=TOLERANCE)
    expected = load_file(next((alone / "model").glob("*.safetensors")))
    for name, tensor in load_file(next((packed / "model").glob("*.safetensors"))).items():
        torch.testing.assert_close(tensor, expected[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)


def test_packed_steps_count_the_same_tokens(trained: Train, alone: Path) -> None:
    counts = [
        [(row["tokens"], row["labelledTokens"]) for row in metrics(output)] for output in (trained(), alone)
    ]
    assert counts[0] == counts[1]
