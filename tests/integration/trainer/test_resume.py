"""A run that was interrupted ends as the unbroken one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job, metrics
from yuan2_core.contract import TrainJob

Train = Callable[..., Path]
BASE = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "every_steps": 2, "stage": 2}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "model").glob("*.safetensors")))


def cut_back(output: Path, step: int, target: Path) -> Path:
    """The output of a run that died after `step`: no later checkpoint, no model, no record."""
    shutil.copytree(output, target)
    shutil.rmtree(target / "model")
    (target / "job.json").unlink()
    for directory in (target / "checkpoints").iterdir():
        if int(directory.name[5:]) > step:
            shutil.rmtree(directory)
    return target


def job_of(inputs: tuple[Path, Path], output: Path, **changes: object) -> TrainJob:
    return make_job(*inputs, output, **{**BASE, **changes})


@pytest.mark.parametrize(
    ("stage", "precision", "processes"),
    [
        (2, "fp32", 1),
        (2, "fp32", 2),
        (3, "fp32", 2),
        (0, "fp32", 2),
        (2, "bf16", 2),
        (0, "bf16", 1),
        (3, "bf16", 1),
    ],
)
def test_resume_equals_the_unbroken_run_exactly(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, stage: int, precision: str, processes: int
) -> None:
    changes = {"stage": stage, "precision": precision, "processes": processes}
    unbroken = trained(**{**BASE, **changes})
    output = cut_back(unbroken, 2, tmp_path / "output")
    train(job_of(inputs, output, **changes), tmp_path / "workspace")
    assert losses(output) == losses(unbroken)
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_number_of_ranks_and_the_stage_may_change_on_the_way(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, stage: int
) -> None:
    """2 ranks, then 1 without ZeRO, then 2 again, with the same global batch."""
    unbroken = trained(**{**BASE, "processes": 2, "stage": stage})
    output = cut_back(unbroken, 2, tmp_path / "output")
    alone = job_of(inputs, output, processes=1, stage=0, gradient_accumulation_steps=4)
    train(alone, tmp_path / "alone")
    middle = cut_back(output, 4, tmp_path / "middle")
    train(job_of(inputs, middle, processes=2, stage=stage), tmp_path / "again")
    assert losses(middle) == pytest.approx(losses(unbroken), abs=1e-5)
    expected = weights(unbroken)
    for name, tensor in weights(middle).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    unbroken = trained(**BASE)
    output = cut_back(unbroken, 4, tmp_path / "output")
    shard = next((output / "checkpoints" / "step-000004").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (output / "checkpoints" / "step-000005.partial").mkdir()
    train(job_of(inputs, output), tmp_path / "workspace")
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    assert "checkpoint step-000004 is skipped" in log
    assert "does not have its checksum" in log
    assert "going on from step-000002" in log
    assert losses(output) == losses(unbroken)
    assert [item.name for item in sorted((output / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]


def test_a_completed_run_is_not_trained_again(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(trained(**BASE), output)
    before = metrics(output)
    job = job_of(inputs, output)
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    assert outcome.exit_code == 0
    assert "already: 6 steps" in outcome.message
    assert metrics(output) == before


def test_checkpoints_of_another_run_are_refused_with_what_differs(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = cut_back(trained(**BASE), 4, tmp_path / "output")
    outcome = run_ranks(job_of(inputs, output, learning_rate=2e-3), tmp_path / "workspace")[0]
    assert outcome.exit_code == 78
    assert outcome.reason == "InvalidJob"
    assert "training.learningRate was 0.001 and is 0.002" in outcome.message
    assert "another output path" in outcome.message


def test_only_the_newest_checkpoints_are_kept(trained: Train) -> None:
    output = trained(**{**BASE, "every_steps": 1, "keep": 2})
    names = sorted(item.name for item in (output / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]
    manifest = json.loads((output / "checkpoints" / "step-000005" / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert manifest["offset"] == 20
