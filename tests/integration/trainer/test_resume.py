"""A run that was interrupted ends as the unbroken one does."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job, metrics, write_model
from yuan2_core.contract import TrainJob
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.progress import read_snapshot

Train = Callable[..., Path]
BASE = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "every_steps": 2, "stage": 2}


LORA = {"method": {"lora": {"dropout": 0.0, "target_modules": ["q_proj", "k_proj", "down_proj"]}}}


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the model or the adapter that a run exported."""
    return load_file(next(output.glob("*/*.safetensors")))


def cut_back(output: Path, step: int, target: Path) -> Path:
    """The output of a run that died after `step`: no later checkpoint, no model, no record."""
    shutil.copytree(output, target)
    for made in ("adapter", "model"):
        shutil.rmtree(target / made, ignore_errors=True)
    (target / "job.json").unlink()
    for directory in (target / "checkpoints").iterdir():
        if int(directory.name[5:]) > step:
            shutil.rmtree(directory)
    return target


def checkpoints(output: Path) -> list[str]:
    return sorted(item.name for item in (output / "checkpoints").iterdir())


def damage(checkpoint: Path) -> None:
    """Flip a bit of one file."""
    shard = next(checkpoint.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


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


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_an_offloaded_run_resumes_exactly(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, stage: int, offload: str
) -> None:
    changes = {"stage": stage, "deepspeed": {"offload": offload}}
    unbroken = trained(**{**BASE, **changes})
    output = cut_back(unbroken, 2, tmp_path / "output")
    train(job_of(inputs, output, **changes), tmp_path / "workspace")
    assert losses(output) == losses(unbroken)


@pytest.mark.parametrize("packing", [True, False])
def test_the_position_in_the_data_is_resumed_in_a_later_epoch(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, packing: bool
) -> None:
    """49 sequences in steps of four: the thirteenth step ends the first epoch."""
    changes = {"max_steps": 17, "every_steps": 15, "packing": packing, "processes": 2, "micro_batch_size": 1}
    unbroken = trained(**{**BASE, **changes})
    output = cut_back(unbroken, 15, tmp_path / "output")
    train(job_of(inputs, output, **changes), tmp_path / "workspace")
    assert "going on from step-000015" in (tmp_path / "workspace" / "rank-0.log").read_text()
    for name in ("loss", "tokens", "epoch"):
        assert [row[name] for row in metrics(output)] == [row[name] for row in metrics(unbroken)]


def test_a_run_that_is_asked_to_end_within_a_step_resumes_exactly(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of one rank's pod, while both are in a step of some twenty micro batches, most likely."""
    changes = {
        "processes": 2,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 24,
        "packing": False,
        "max_steps": 8,
        "every_steps": 100,
    }
    output = tmp_path / "output"
    job = job_of(inputs, output, **changes)

    def ask_to_end() -> None:
        workspace = Workspace(tmp_path / "first")
        while read_snapshot(workspace).step < 2:
            time.sleep(0.01)
        workspace.stop.touch()

    outcomes = run_ranks(job, tmp_path / "first", meanwhile=ask_to_end)
    assert {outcome.exit_code for outcome in outcomes} == {75}
    [saved] = [int(item.name[5:]) for item in (output / "checkpoints").iterdir()]
    assert f"checkpoint written at step {saved} of 8" in outcomes[0].message
    train(job, tmp_path / "second")
    assert losses(output) == losses(trained(**{**BASE, **changes}))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("between", ["same stage", "without ZeRO"])
def test_the_number_of_ranks_and_the_stage_may_change_on_the_way(
    trained: Train,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    stage: int,
    method: dict[str, Any],
    between: str,
) -> None:
    """2 ranks, then 1, then 2 again, with the same global batch."""
    unbroken = trained(**{**BASE, **method, "processes": 2, "stage": stage})
    output = cut_back(unbroken, 2, tmp_path / "output")
    alone = {
        "processes": 1,
        "stage": stage if between == "same stage" else 0,
        "gradient_accumulation_steps": 4,
    }
    train(job_of(inputs, output, **method, **alone), tmp_path / "alone")
    middle = cut_back(output, 4, tmp_path / "middle")
    train(job_of(inputs, middle, **method, processes=2, stage=stage), tmp_path / "again")
    assert "going on from step-000004" in (tmp_path / "again" / "rank-0.log").read_text()
    assert losses(middle) == pytest.approx(losses(unbroken), abs=1e-5)
    expected = weights(unbroken)
    for name, tensor in weights(middle).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    unbroken = trained(**BASE)
    output = cut_back(unbroken, 4, tmp_path / "output")
    damage(output / "checkpoints" / "step-000004")
    (output / "checkpoints" / "step-000005.partial").mkdir()
    train(job_of(inputs, output), tmp_path / "workspace")
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    assert "checkpoint step-000004 is skipped" in log
    assert "does not have its checksum" in log
    assert "going on from step-000002" in log
    assert losses(output) == losses(unbroken)
    assert checkpoints(output) == ["step-000002", "step-000004", "step-000006"]


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


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_checkpoints_do_not_go_on_over_another_base_model(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    """Of the same size, under the same name."""
    output = cut_back(trained(**{**BASE, **method}), 4, tmp_path / "output")
    other = write_model(tmp_path / "model", seed=1)
    job = make_job(other, inputs[1], output, **{**BASE, **method})
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    assert "the base model (config.json or the weights of model.source) changed" in outcome.message


def test_checkpoints_of_an_earlier_release_go_on_with_a_warning(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """They do not say which base model they were trained from."""
    output = cut_back(trained(**BASE), 4, tmp_path / "output")
    for path in (output / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["identity"]["model.files"], manifest["optimizer_step"]
        path.write_text(json.dumps(manifest))
    train(job_of(inputs, output), tmp_path / "workspace")
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    assert "do not say which base model" in log
    assert losses(output) == losses(trained(**BASE))


def test_only_the_newest_checkpoints_are_kept(trained: Train) -> None:
    output = trained(**{**BASE, "every_steps": 1, "keep": 2})
    assert checkpoints(output) == ["step-000005", "step-000006"]
    manifest = json.loads((output / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert manifest["step"] == 6
    assert manifest["offset"] == 24


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_are_written_by_the_clock_of_rank_0(
    inputs: tuple[Path, Path], tmp_path: Path, processes: int
) -> None:
    """It is 25 s later at each look, one a step and one a checkpoint; that of rank 1 stands. Of checkpoints
    by time only the newest stays, beside those by steps."""
    changes = {"max_steps": 8, "every_steps": 4, "every_seconds": 60, "processes": processes}
    job = job_of(inputs, tmp_path / "output", **changes)
    module = "tests.support.clocked_rank"
    for outcome in run_ranks(job, tmp_path / "workspace", module=module, more=("25",)):
        assert outcome.exit_code == 0, outcome
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    written = [int(step) for step in re.findall(r"checkpoint of step (\d+) is complete", log)]
    assert written == [3, 4, 7, 8]
    assert checkpoints(tmp_path / "output") == ["step-000004", "step-000008"]


def test_a_run_that_died_in_its_export_trains_no_step_again(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    unbroken = trained(**{**BASE, "every_steps": 100})
    output = cut_back(unbroken, 6, tmp_path / "output")
    assert checkpoints(output) == ["step-000006"]
    train(job_of(inputs, output, every_steps=100), tmp_path / "workspace")
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    assert "going on from step-000006, step 6 of 6" in log
    assert "rank 0: step 6/6" not in log
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())
