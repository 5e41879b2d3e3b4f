"""What the operator and Prometheus read."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError

import pytest

from yuan2_core.contract import Progress
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.metrics import MetricsLog
from yuan2_trainer.reporting.progress import Snapshot, StepReport, Tracker, progress_at, read_snapshot
from yuan2_trainer.reporting.progress_server import ProgressServer


def report(step: int, seconds: float = 2.0, loss: float = 1.5) -> StepReport:
    return StepReport(
        step=step,
        epoch=step / 10,
        loss=loss,
        learning_rate=1e-5,
        grad_norm=0.5,
        tokens=100,
        labelled_tokens=40,
        seconds=seconds,
    )


def test_an_attempt_that_has_not_begun_is_starting(tmp_path: Path) -> None:
    progress = progress_at(read_snapshot(Workspace(tmp_path)), "a", 2, started_at=10.0, now=14.0)
    assert (progress.state, progress.step, progress.attempt) == ("starting", 0, 2)
    assert progress.seconds_total == 4.0
    assert progress.last_step_age_seconds is None
    assert progress.eta_seconds is None


def test_steps_are_folded_into_rates_and_remaining_time(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    tracker = Tracker(workspace)
    tracker.update(state="training", total_steps=10, samples=50)
    for step in (1, 2, 3, 4):
        tracker.after_step(report(step, seconds=step), now=100.0 + step)
    progress = progress_at(read_snapshot(workspace), "a", 1, started_at=90.0, now=105.0)
    assert progress.step == 4
    assert progress.tokens_per_second == pytest.approx(400 / 10)
    assert progress.seconds_in_steps == 10
    assert progress.last_step_age_seconds == 1.0
    assert progress.eta_seconds == pytest.approx(6 * 2.5 - 1.0)
    assert progress.samples == 50


def test_utilisation_is_a_mean_over_recent_time(tmp_path: Path) -> None:
    tracker = Tracker(Workspace(tmp_path))
    for step, (seconds, mfu) in enumerate(((1.0, 0.2), (3.0, 0.4)), start=1):
        done = replace(report(step, seconds=seconds), mfu=mfu, memory_bytes=step << 30)
        tracker.after_step(done, now=10.0)
    assert tracker.snapshot.mfu == pytest.approx((0.2 * 1 + 0.4 * 3) / 4)
    assert tracker.snapshot.memory_bytes == 2 << 30
    tracker.after_step(report(3), now=11.0)
    assert tracker.snapshot.mfu is None


def test_the_age_of_the_last_step_grows_while_nothing_happens(tmp_path: Path) -> None:
    snapshot = Snapshot(state="training", step=3, total_steps=4, step_seconds=2.0, last_step_at=100.0)
    ages = [progress_at(snapshot, "a", 1, 0.0, now).last_step_age_seconds for now in (100.0, 160.0, 700.0)]
    assert ages == [0.0, 60.0, 600.0]
    assert progress_at(snapshot, "a", 1, 0.0, 700.0).eta_seconds == 0.0


def test_the_age_of_a_state_begins_anew_only_when_the_state_changes(tmp_path: Path) -> None:
    moments = iter((100.0, 130.0))
    tracker = Tracker(Workspace(tmp_path), clock=lambda: next(moments))
    assert progress_at(tracker.snapshot, "a", 1, 0.0, 100.0).state_age_seconds is None
    tracker.update(state="loading")
    tracker.update(state="loading", samples=3)
    assert progress_at(tracker.snapshot, "a", 1, 0.0, 107.0).state_age_seconds == 7.0
    tracker.update(state="training")
    assert progress_at(tracker.snapshot, "a", 1, 0.0, 131.5).state_age_seconds == 1.5


def test_a_loss_that_is_not_a_number_is_still_json(tmp_path: Path) -> None:
    tracker = Tracker(Workspace(tmp_path))
    tracker.after_step(report(1, loss=float("nan")), now=1.0)
    progress = progress_at(read_snapshot(tracker.workspace), "a", 1, 0.0, 2.0)
    assert Progress.model_validate_json(progress.to_json()).loss is None


@pytest.fixture
def server() -> Iterator[ProgressServer]:
    progress = Progress(
        name="alpaca",
        attempt=3,
        state="training",
        step=7,
        total_steps=9,
        loss=0.25,
        last_step_age_seconds=1.5,
        seconds_in_steps=6.0,
        seconds_total=8.0,
        learning_rate=2e-5,
        tokens_per_second=1300.0,
        mfu=0.41,
        memory_bytes=4096,
        eval_loss=0.5,
        best_step=5,
    )
    server = ProgressServer(0, lambda: progress, lambda: "=== rank 0 (pid 7) ===\n")
    server.start()
    yield server
    server.close()


def get(server: ProgressServer, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_progress_is_served_as_json(server: ProgressServer) -> None:
    kind, body = get(server, "/progress?x=1")
    assert kind == "application/json"
    assert json.loads(body)["totalSteps"] == 9
    assert "gradNorm" not in json.loads(body)


def test_metrics_are_served_for_prometheus(server: ProgressServer) -> None:
    _, body = get(server, "/metrics")
    labels = '{attempt="3",name="alpaca"}'
    assert f"yuan2_train_step{labels} 7.0" in body
    assert f"yuan2_train_loss{labels} 0.25" in body
    assert f"yuan2_train_last_step_age_seconds{labels} 1.5" in body
    assert f"yuan2_train_seconds_in_steps_total{labels} 6.0" in body
    assert 'yuan2_train_state{attempt="3",name="alpaca",state="training"} 1.0' in body
    assert f"yuan2_train_learning_rate{labels} 2e-05" in body
    assert f"yuan2_train_tokens_per_second{labels} 1300.0" in body
    assert f"yuan2_train_mfu{labels} 0.41" in body
    assert f"yuan2_train_memory_bytes{labels} 4096.0" in body
    assert f"yuan2_train_eval_loss{labels} 0.5" in body
    assert f"yuan2_train_best_step{labels} 5.0" in body
    assert "yuan2_train_grad_norm" not in body


def test_other_paths_say_what_there_is(server: ProgressServer) -> None:
    with pytest.raises(HTTPError) as caught:
        get(server, "/")
    assert caught.value.code == 404
    assert b"/metrics, /progress, /stacks" in caught.value.read()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.append(report(step))
    log.close()
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    log = MetricsLog(path, 2)
    log.append(report(3, loss=float("inf")))
    log.close()
    assert steps_in(path) == [1, 2, 3]
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["loss"] is None
    assert last["tokensPerSecond"] == 50.0


def test_a_run_from_the_beginning_starts_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path, 0).close()
    assert path.read_text() == ""


def test_a_pod_without_rank_0_answers_for_its_stacks_only() -> None:
    asked: list[int] = []
    server = ProgressServer(0, None, lambda: f"read {asked.append(1) or len(asked)} times")
    server.start()
    try:
        assert get(server, "/stacks") == ("text/plain; charset=utf-8", "read 1 times")
        assert get(server, "/stacks")[1] == "read 1 times", "ranks are not stopped for everybody who asks"
        with pytest.raises(HTTPError, match="404"):
            get(server, "/progress")
    finally:
        server.close()
