"""A single process trains, resumes and exports, on each supported torch and DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job, write_data, write_model

SETTINGS = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "every_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("inputs")
    return write_model(root / "model", layers=1), write_data(root / "data.json", 12)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_resumes_exactly_and_exports(inputs: tuple[Path, Path], tmp_path: Path, stage: int) -> None:
    job = make_job(*inputs, tmp_path / "output", stage=stage, **SETTINGS)
    train(job, tmp_path / "first")
    unbroken, model = losses(tmp_path / "output"), tmp_path / "output" / "model"
    expected = load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    assert unbroken[-1] < unbroken[0]
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "output" / "checkpoints" / "step-000004")
    train(job, tmp_path / "second")
    assert "going on from step-000002" in (tmp_path / "second" / "rank-0.log").read_text()
    assert losses(tmp_path / "output") == unbroken
    again = load_file(model / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_what_gloo_must_know_is_used_or_asked_for(
    inputs: tuple[Path, Path], tmp_path: Path, stage: int, precision: str
) -> None:
    job = make_job(*inputs, tmp_path / "output", stage=stage, precision=precision, **SETTINGS)
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    if torch.__version__.startswith("2.1."):
        assert outcome.exit_code == 78
        assert f"training.precision {precision} with deepspeed.stage {stage}: torch 2.1." in outcome.message
    else:
        assert outcome.exit_code == 0
        assert losses(tmp_path / "output")[-1] < losses(tmp_path / "output")[0]
