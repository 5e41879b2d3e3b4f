"""What a run writes into its output while it goes on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import make_job
from yuan2_core.contract import TrainJob
from yuan2_core.estimate import GPUS
from yuan2_model.dimensions import Dimensions
from yuan2_model.flops import model_flops
from yuan2_trainer.pod.launcher import load_job
from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.reporting.mfu import Meter, memory_bytes, peak_flops
from yuan2_trainer.reporting.plot import draw_losses, make_figure, read_curves, running_mean
from yuan2_trainer.reporting.progress import EvaluationReport, StepReport
from yuan2_trainer.reporting.step_log import PICTURE, Recording

SMALL = Dimensions(100, 32, 64, 2, 4, 128, 0, True)


def report(step: int, loss: float | None = None, mfu: float | None = 0.25) -> StepReport:
    return StepReport(
        step=step,
        epoch=step / 10,
        loss=3.0 / step if loss is None else loss,
        learning_rate=2e-5,
        grad_norm=0.5,
        tokens=100,
        labelled_tokens=40,
        seconds=2.0,
        mfu=mfu,
        memory_bytes=1 << 30,
    )


def evaluation(step: int) -> EvaluationReport:
    return EvaluationReport(step=step, epoch=step / 10, eval_loss=2.0 / step, perplexity=math.exp(2.0 / step))


def job_in(output: Path, tensorboard: bool = False) -> TrainJob:
    return make_job(Path("/m"), Path("/d"), output, tensorboard=tensorboard)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's own reader: what a user sees."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_a_line_has_the_numbers_of_a_step_or_of_an_evaluation(tmp_path: Path) -> None:
    recording = Recording(job_in(tmp_path), 0)
    recording.after_step(report(1, mfu=None))
    recording.after_evaluation(evaluation(1))
    recording.close()
    step, judged = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert step == {
        "step": 1,
        "epoch": 0.1,
        "loss": 3.0,
        "learningRate": 2e-5,
        "gradNorm": 0.5,
        "tokens": 100,
        "labelledTokens": 40,
        "seconds": 2.0,
        "tokensPerSecond": 50.0,
        "mfu": None,
        "memoryBytes": 1 << 30,
    }
    assert judged == {"step": 1, "epoch": 0.1, "evalLoss": 2.0, "perplexity": pytest.approx(math.exp(2))}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    recording = Recording(job_in(tmp_path, tensorboard=True), 0)
    for step in (1, 2, 3, 4):
        recording.after_step(report(step, loss=9.0 if step > 2 else None))
    recording.after_evaluation(evaluation(4))
    recording.close()
    recording = Recording(job_in(tmp_path, tensorboard=True), 2)  # killed after 4, its checkpoint is of 2
    for step in (3, 4, 5):
        recording.after_step(report(step, loss=math.nan if step == 5 else None))
    recording.after_evaluation(evaluation(4))
    recording.after_checkpoint()
    found = scalars(tmp_path / "tensorboard")
    recording.close()
    assert found["train/loss"] == [(step, pytest.approx(3.0 / step)) for step in (1, 2, 3, 4)]
    assert [step for step, _ in found["train/learning_rate"]] == [1, 2, 3, 4, 5]
    assert found["evaluation/loss"] == [(4, 0.5)]
    assert found["speed/mfu"][0] == (1, 0.25)
    assert set(found) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/epoch",
        "speed/tokens_per_second",
        "speed/mfu",
        "speed/memory_bytes",
        "evaluation/loss",
        "evaluation/perplexity",
    }


def test_no_tensorboard_unless_asked_for(tmp_path: Path) -> None:
    recording = Recording(job_in(tmp_path), 0)
    recording.after_step(report(1))
    recording.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_image_without_tensorboard_is_an_invalid_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(JobError, match="tensorboard: this image has no package tensorboard"):
        Recording(job_in(tmp_path, tensorboard=True), 0)


def test_the_picture_shows_losses_evaluations_and_the_rate(tmp_path: Path) -> None:
    recording = Recording(job_in(tmp_path), 0)
    for step in range(1, 121):
        recording.after_step(report(step, loss=1e6 if step == 60 else None))
        if step % 20 == 0:
            recording.after_evaluation(evaluation(step))
    recording.draw()
    recording.close()
    assert (tmp_path / PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    curves = read_curves(tmp_path / "metrics.jsonl")
    upper, lower = make_figure(curves, "tiny").axes
    labels = [line.get_label() for line in upper.get_lines()]
    assert labels == ["training, each step", "training, smoothed", "evaluation"]
    assert list(upper.get_lines()[2].get_xdata()) == [20, 40, 60, 80, 100, 120]
    assert upper.get_ylim()[1] < 1e5  # one spike does not flatten the rest
    assert upper.get_ylim()[0] < 3.0 / 120
    assert "10$^{-5}$" in lower.get_ylabel()
    assert list(lower.get_lines()[0].get_ydata()) == pytest.approx([2.0] * 120)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_run_of_few_steps_has_one_line(tmp_path: Path) -> None:
    recording = Recording(job_in(tmp_path), 0)
    for step, loss in enumerate((3.0, math.nan, 1.0), start=1):
        recording.after_step(report(step, loss=loss))
    recording.close()
    figure = make_figure(read_curves(tmp_path / "metrics.jsonl"), "tiny")
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["training"]
    assert "tiny: 3 steps, 0.30 epochs, loss 1.000" in figure.get_suptitle()


def test_nothing_is_drawn_before_the_first_step(tmp_path: Path) -> None:
    draw_losses(tmp_path / "metrics.jsonl", tmp_path / PICTURE, "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recording = Recording(job_in(tmp_path), 0)
    recording.after_step(report(1))
    (tmp_path / PICTURE).mkdir()
    with caplog.at_level(logging.WARNING):
        recording.draw()
    assert "loss.png was not drawn: IsADirectoryError" in caplog.text
    recording.close()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_a_running_mean_is_the_mean_around_each_value(values: list[float], window: int) -> None:
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(running_mean(np.asarray(values), window), expected, atol=1e-9)


def test_utilisation_is_model_flops_over_peak() -> None:
    flops = model_flops(SMALL, 100, 1000, 40, None)
    meter = Meter(SMALL, adapter=None, peak=4.0 * flops)
    assert meter.mfu(100, 1000, 40, seconds=0.5) == pytest.approx(0.5)
    frozen = Meter(SMALL, adapter=64, peak=4.0 * flops).mfu(100, 1000, 40, seconds=0.5)
    assert frozen is not None
    assert frozen < 0.4


def test_utilisation_is_absent_on_a_processor() -> None:
    assert Meter.of(job_in(Path("/o")), SMALL).peak is None
    assert Meter(SMALL, None, None).mfu(1, 1, 1, 1.0) is None


def test_the_peak_is_the_data_sheets_in_the_type_that_is_multiplied() -> None:
    a100 = GPUS["A100-80"].bf16_flops
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16", tf32=True) == a100
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == a100 / 2
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", tf32=False) is None
    assert peak_flops("NVIDIA L20", "bf16", tf32=False) == GPUS["L20"].bf16_flops
    assert peak_flops("Some Other GPU", "bf16", tf32=True) is None


def test_memory_on_a_processor_is_the_highest_resident_set() -> None:
    before = memory_bytes(torch.device("cpu"))
    filled = torch.ones(1 << 24)
    assert memory_bytes(torch.device("cpu")) >= before
    assert before > 1 << 25
    assert float(filled[-1]) == 1


def test_a_job_is_read_from_the_record_of_a_run(tmp_path: Path) -> None:
    job = job_in(tmp_path / "out")
    record = tmp_path / "job.json"
    record.write_text(json.dumps({"job": json.loads(job.to_json()), "step": 3, "complete": True}))
    assert load_job(record) == job
    record.write_text(job.to_json())
    assert load_job(record) == job
    record.write_text('{"job": {"name": 1')
    with pytest.raises(JobError, match=r"job\.json is not JSON"):
        load_job(record)
