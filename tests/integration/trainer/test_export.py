"""The export: with no more memory than for a layer, from where it stopped, and never for two attempts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks, start_ranks
from tests.support.training import make_job, write_data, write_model
from yuan2_core.contract import TrainJob
from yuan2_trainer.pod.lease import LEASE
from yuan2_trainer.pod.outcome import Outcome
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.progress import read_snapshot

MODULE = "tests.support.exporting_rank"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"method": {"lora": {"r": 2, "target_modules": ALL}}, "merge_adapter": True}
QLORA: dict[str, Any] = {**LORA, "method": {"qlora": {"r": 2, "target_modules": ALL}}}
SETTINGS: dict[str, Any] = {
    "precision": "bf16",
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that is large beside its largest tensor: 28 million numbers in 24 layers."""
    root = tmp_path_factory.mktemp("large")
    return write_model(root / "model", layers=24, hidden=256), write_data(root / "data.json", 4)


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((output / "model").glob("*.safetensors")):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize(
    ("method", "stage", "processes"),
    [({}, 3, 2), (LORA, 3, 2), (QLORA, 2, 1)],
    ids=["full-3", "lora-3", "qlora-2"],
)
def test_an_export_needs_less_memory_than_its_model(
    large: tuple[Path, Path], tmp_path: Path, method: dict[str, Any], stage: int, processes: int
) -> None:
    """From its beginning on, a rank may take half of what the model weighs."""
    job = make_job(*large, tmp_path / "output", stage=stage, processes=processes, **SETTINGS, **method)
    size = (large[0] / "model.safetensors").stat().st_size // 2  # stored in fp32
    outcomes = run_ranks(job, tmp_path / "ranks", 600, module=MODULE, more=(f"memory={size // 2}",))
    assert [outcome.exit_code for outcome in outcomes] == [0] * processes, outcomes
    assert (tmp_path / "output" / "model" / "model.safetensors").stat().st_size > size


def test_a_whole_model_does_not_fit_into_that_memory(large: tuple[Path, Path], tmp_path: Path) -> None:
    job = make_job(*large, tmp_path / "output", stage=3, processes=2, **SETTINGS, **LORA)
    size = (large[0] / "model.safetensors").stat().st_size // 2
    more = (f"memory={size // 2}", "hoard=1")
    outcomes = run_ranks(job, tmp_path / "ranks", 600, module=MODULE, more=more)
    assert {outcome.exit_code for outcome in outcomes} == {1}
    assert any("memory" in outcome.message for outcome in outcomes)


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_an_export_goes_on_where_it_stopped(
    inputs: tuple[Path, Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    settings = {**SETTINGS, "stage": 3, "processes": 2, **method}
    job = make_job(*inputs, tmp_path / "output", **settings)
    small = ("shard=20000",)
    stopped = run_ranks(job, tmp_path / "first", module=MODULE, more=(*small, "stop=20"))
    assert {outcome.exit_code for outcome in stopped} == {75}
    assert "asked to end during the export" in stopped[0].message
    partial = tmp_path / "output" / ".model.partial"
    if not method:
        before = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
        assert before
    assert not (tmp_path / "output" / "model").exists()
    done = run_ranks(job, tmp_path / "second", module=MODULE, more=small)
    assert {outcome.exit_code for outcome in done} == {0}
    if not method:
        after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "output" / "model").iterdir()}
        assert before.items() <= after.items()
        assert len(after) > len(before) + 2
    assert not partial.exists()
    snapshot = read_snapshot(Workspace(tmp_path / "second"))
    assert snapshot.state == "complete"
    assert snapshot.last_step_at is not None

    whole = job.model_copy(update={"output": str(tmp_path / "whole")})
    shutil.copytree(tmp_path / "output" / "checkpoints", tmp_path / "whole" / "checkpoints")
    assert run_ranks(whole, tmp_path / "third")[0].exit_code == 0
    expected = weights(tmp_path / "whole")
    assert set(expected) == set(weights(tmp_path / "output"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "output").items())


def test_files_of_other_weights_are_written_anew(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    job = make_job(*inputs, tmp_path / "output", **SETTINGS)
    small = ("shard=20000",)
    assert run_ranks(job, tmp_path / "first", module=MODULE, more=(*small, "stop=20"))[0].exit_code == 75
    shutil.rmtree(tmp_path / "output" / "checkpoints")
    other = job.model_copy(update={"training": job.training.model_copy(update={"learning_rate": 0.1})})
    assert run_ranks(other, tmp_path / "second", module=MODULE, more=small)[0].exit_code == 0
    fresh = other.model_copy(update={"output": str(tmp_path / "fresh")})
    assert run_ranks(fresh, tmp_path / "third")[0].exit_code == 0
    expected = weights(tmp_path / "fresh")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "output").items())


def numbered(job: TrainJob, attempt: int) -> TrainJob:
    return job.model_copy(update={"attempt": attempt})


def test_an_attempt_that_was_replaced_moves_nothing_into_the_output(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The second one starts while the first, cut off, trains on."""
    job = make_job(*inputs, tmp_path / "output", **{**SETTINGS, "max_steps": 100_000, "every_steps": 5})
    workspace, ranks = start_ranks(job, tmp_path / "first")
    while (read_snapshot(workspace).last_checkpoint_step or 0) < 5:
        assert ranks[0].is_alive()
        ranks[0].join(0.05)
    lease = tmp_path / "output" / LEASE
    lease.write_text(lease.read_text().replace('"attempt":1', '"attempt":2'))
    ranks[0].join(120)
    outcome = Outcome.from_json(workspace.outcome(0).read_text())
    assert (outcome.exit_code, outcome.reason) == (78, "Superseded")
    assert "belongs to attempt 2 of test/tiny now" in outcome.message
    assert not (tmp_path / "output" / "model").exists()
