"""What ZeRO-3 gathers in a step, by the parameters that it may keep: 51B and 102B in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.training import losses, make_job, write_model
from yuan2_core.estimate import Shape
from yuan2_core.zero_limits import LIVE_PARAMETERS, zero_3_limits
from yuan2_model import check_model_directory

LAYER_OF_51B = 1_207_959_552
STEPS: dict[str, Any] = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "packing": False}


def test_limits_by_size_gather_a_layer_once_for_its_way_back(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", layers=6)
    layer = Shape.of(check_model_directory(model).dimensions).layer
    scale = layer / LAYER_OF_51B
    default = gathered(model, inputs[1], tmp_path / "default", int(scale * LIVE_PARAMETERS))
    ours = gathered(model, inputs[1], tmp_path / "ours", int(scale * zero_3_limits(8192, LAYER_OF_51B).live))
    # Forward pass, recomputation and, with the default, more than a third of the layers once more.
    assert ours <= default - 6 * layer / 3
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "default"), abs=1e-5)


def gathered(model: Path, data: Path, output: Path, live: int) -> float:
    """Numbers that a rank gathers in a step, once DeepSpeed knows the order of the modules."""
    limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    limits |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": live // 20}
    overrides = {"overrides": {"zero_optimization": limits}}
    totals = []
    for steps in (3, 5):
        job = make_job(
            model, data, output, stage=3, processes=2, max_steps=steps, deepspeed=overrides, **STEPS
        )
        if steps == 3:
            job = job.model_copy(update={"output": f"{output}-short"})
        workspace = output.with_name(f"{output.name}-{steps}")
        for outcome in run_ranks(job, workspace, module="tests.support.gathering_rank"):
            assert outcome.exit_code == 0, outcome
        totals.append(sum(map(int, (workspace / "gathered-0.txt").read_text().split())))
    return (totals[1] - totals[0]) / 2
