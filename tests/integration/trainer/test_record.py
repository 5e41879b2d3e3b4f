"""A run is run again from what it left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.ranks import train
from tests.support.training import losses, metrics
from yuan2_trainer.pod.launcher import load_job

Train = Callable[..., Path]


def test_the_record_runs_again_with_the_same_losses_and_weights(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    first = trained(processes=2, micro_batch_size=4, packing=True, tensorboard=True)
    job = load_job(first / "job.json").model_copy(update={"output": str(tmp_path / "again")})
    train(job, tmp_path / "workspace")
    assert losses(tmp_path / "again") == losses(first)
    one, other = (
        load_file(next((path / "model").glob("*.safetensors"))) for path in (first, Path(job.output))
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_record_says_on_what_and_with_what(trained: Train, inputs: tuple[Path, Path]) -> None:
    output = trained(processes=2, micro_batch_size=4, packing=True, tensorboard=True)
    record = json.loads((output / "job.json").read_text())
    assert (record["complete"], record["step"]) == (True, 8)
    assert {"python", "torch", "deepspeed", "transformers", "peft", "numpy"} <= set(record["versions"])
    assert record["hardware"]["processes"] == 2
    assert record["data"]["fingerprint"] == record["identity"]["dataset"]
    assert record["data"]["samples"] == 49
    assert record["model"]["files"]["config.json"] == (inputs[0] / "config.json").stat().st_size
    assert record["model"]["path"] == str(inputs[0])


def test_a_finished_run_has_left_its_picture_logs_and_numbers(trained: Train) -> None:
    output = trained(processes=2, micro_batch_size=4, packing=True, tensorboard=True)
    assert (output / "loss.png").stat().st_size > 10_000
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    rows = metrics(output)
    assert all(row["mfu"] is None and row["memoryBytes"] > 1 << 26 for row in rows)
    assert all(row["tokensPerSecond"] > 0 for row in rows)
