"""Optimizer, schedule, smoothed labels and noise: a resumed run ends as the unbroken one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.trainer.test_resume import BASE, cut_back, job_of, weights
from tests.support.ranks import train
from tests.support.training import losses, metrics
from yuan2_trainer.train.schedule import learning_rate

Train = Callable[..., Path]
ALL: dict[str, Any] = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "schedule": "wsd",
    "decay_steps": 3,
    "min_learning_rate": 1e-4,
    "label_smoothing": 0.1,
    "neftune_alpha": 5.0,
    "processes": 2,
}


def test_a_resumed_run_ends_as_the_unbroken_one(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    unbroken = trained(**{**BASE, **ALL})
    output = cut_back(unbroken, 4, tmp_path / "output")
    job = job_of(inputs, output, **ALL)
    train(job, tmp_path / "workspace")
    assert losses(output) == losses(unbroken)
    expected = weights(unbroken)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(output).items())
    rates = [row["learningRate"] for row in metrics(output)]
    assert rates == pytest.approx([learning_rate(job.training, step, 6) for step in range(6)])


@pytest.mark.parametrize("option", ["adam_beta1", "adam_beta2", "label_smoothing", "neftune_alpha"])
def test_an_option_changes_what_is_learned(trained: Train, option: str) -> None:
    plain = losses(trained(**BASE))
    assert losses(trained(**BASE, **{option: ALL[option]}))[-1] != pytest.approx(plain[-1], abs=1e-6)


def test_an_evaluation_knows_neither_smoothing_nor_noise(trained: Train) -> None:
    held_out = {"eval_fraction": 0.3, "evaluation": {"every_steps": 3, "sample_answers": 0}}
    plain, changed = (
        [row["evalLoss"] for row in metrics(trained(**BASE, **held_out, **changes)) if "evalLoss" in row]
        for changes in ({}, {"label_smoothing": 0.3, "neftune_alpha": 20.0})
    )
    assert changed[0] == plain[0]
    assert changed[1] != plain[1]
