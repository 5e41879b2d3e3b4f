"""A step whose gradient is not finite is skipped, and a run that skips one has lost nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.ranks import run_ranks, start_ranks
from tests.support.training import make_job, metrics
from yuan2_core.contract import TrainJob
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model.dimensions import EMBEDDING
from yuan2_trainer.data.order import epoch_order
from yuan2_trainer.pod.outcome import Outcome

RECORDS, BATCH, SEED = 24, 4, 42
SETTINGS = {
    "loss": "efficient",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "every_steps": 2,
    "seed": SEED,
}
POISON = "\u00e9"
"""No other text holds it, so that its first byte's embedding is read by no other sample."""


@pytest.fixture(scope="module")
def model(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is right but for one embedding, which is infinite: of whatever reads it, the loss and the
    gradient are not finite."""
    directory = Path(shutil.copytree(inputs[0], tmp_path_factory.mktemp("poisoned") / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(directory / "model.safetensors")
    ids = Yuan2Tokenizer.from_pretrained(directory).encode(POISON)
    tensors[EMBEDDING][ids[-2:]] = torch.inf
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def poisoned(path: Path, steps: Collection[int]) -> Path:
    """Conversations of which one in each of these steps (from 1) reads that embedding."""
    order = epoch_order(np.arange(RECORDS, dtype=np.int32), SEED, 0)
    bad = {int(order[(step - 1) * BATCH]) for step in steps}
    records = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": f"wind {number}?" + (POISON if number in bad else "")},
                {"from": "gpt", "value": f"rain is {number * 7 % 13}"},
            ],
        }
        for number in range(RECORDS)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def job_of(model: Path, directory: Path, steps: Collection[int], **changes: object) -> TrainJob:
    data = poisoned(directory / "data.json", steps)
    return make_job(model, data, directory / "output", **{**SETTINGS, **changes})


def checkpoints(output: Path) -> list[str]:
    return sorted(item.name for item in (output / "checkpoints").iterdir())


def lost_steps(output: Path) -> list[int]:
    return [row["step"] for row in metrics(output) if row["loss"] is None]


@pytest.mark.parametrize(
    ("stage", "precision", "processes"),
    [(2, "fp32", 1), (2, "bf16", 1), (3, "fp32", 2), (0, "fp32", 1), (0, "bf16", 1)],
)
def test_a_skipped_step_drops_no_checkpoint_and_fails_no_run(
    model: Path, tmp_path: Path, stage: int, precision: str, processes: int
) -> None:
    """The second, where a checkpoint is due, and the last one; then the run goes on from that checkpoint
    exactly."""
    changes = {"gradient_accumulation_steps": BATCH // (2 * processes), "processes": processes}
    job = job_of(model, tmp_path, {2, 4}, stage=stage, precision=precision, **changes)
    outcome = run_ranks(job, tmp_path / "first")[0]
    assert outcome.exit_code == 0, outcome
    output = tmp_path / "output"
    assert lost_steps(output) == [2, 4]
    assert "step-000002" in checkpoints(output)
    before, unbroken = metrics(output), load_file(output / "model" / "model.safetensors")
    assert all(tensor[torch.isfinite(tensor)].numel() for tensor in unbroken.values())
    shutil.rmtree(output / "model")
    for name in checkpoints(output):
        if name > "step-000002":
            shutil.rmtree(output / "checkpoints" / name)
    assert run_ranks(job, tmp_path / "second")[0].exit_code == 0
    assert "going on from step-000002" in (tmp_path / "second" / "rank-0.log").read_text()
    assert [row["loss"] for row in metrics(output)] == [row["loss"] for row in before]
    again = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in again.items())


def test_a_pod_that_is_asked_to_end_at_a_skipped_step_saves_what_it_has_done(
    model: Path, tmp_path: Path
) -> None:
    changes = {"every_steps": 100, "gradient_accumulation_steps": 1, "micro_batch_size": BATCH}
    outcome = asked_to_end(job_of(model, tmp_path, {1}, **changes), tmp_path)
    assert (outcome.exit_code, outcome.reason) == (75, "Preempted")
    assert "checkpoint written at step 1 of 4" in outcome.message
    assert checkpoints(tmp_path / "output") == ["step-000001"]


def asked_to_end(job: TrainJob, directory: Path) -> Outcome:
    """After the first step, which has a single micro batch and so no place before its end to stop at."""
    workspace, ranks = start_ranks(job, directory / "workspace")
    workspace.stop.touch()
    for rank in ranks:
        rank.join(150)
    return Outcome.from_json(workspace.outcome(0).read_text())


def test_three_skipped_steps_in_a_row_fail_the_run(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, {2, 3, 4}, every_steps=1)
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    assert "was not a finite number from step 2 to 4" in outcome.message
    assert not (tmp_path / "output" / "model").exists()
