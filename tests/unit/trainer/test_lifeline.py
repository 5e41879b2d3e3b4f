"""Pods that hear of each other's end through torchrun's store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tests.support.ports import free_port
from yuan2_trainer.pod import lifeline
from yuan2_trainer.pod.lifeline import SILENCE_SECONDS, Lifeline, Watch

RUNNING = {0: 0, 1: 0, 2: 0}


def test_a_pod_that_counts_is_well() -> None:
    watch = Watch(0, 3)
    for second in range(100):
        assert watch.lost({0: second, 1: second, 2: second}, RUNNING, float(second)) is None


def test_a_pod_that_has_not_joined_is_waited_for() -> None:
    watch = Watch(0, 3)
    for second in range(1000):
        assert watch.lost({0: second, 1: second + 1, 2: 0}, RUNNING, float(second)) is None


def test_a_silent_pod_is_lost() -> None:
    watch = Watch(0, 3)
    assert watch.lost({0: 1, 1: 4, 2: 4}, RUNNING, 10.0) is None
    assert watch.lost({0: 2, 1: 4, 2: 5}, RUNNING, 10.0 + SILENCE_SECONDS) is None
    loss = watch.lost({0: 3, 1: 4, 2: 6}, RUNNING, 10.1 + SILENCE_SECONDS)
    assert loss is not None
    assert loss.startswith("pod 1 has been silent")


def test_a_failure_is_a_loss_at_once_and_a_good_end_is_none() -> None:
    watch = Watch(1, 3)
    beats = {0: 5, 1: 5, 2: 5}
    for second in (0.0, 100.0):
        assert watch.lost(beats | {0: 5 + int(second)}, {0: 0, 1: 0, 2: 1}, second) is None
    assert watch.lost(beats, {0: 2, 1: 0, 2: 1}, 101.0) == "a rank of pod 0 ended"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[TCPStore]]]:
    """torchrun's store, in the list until a test takes it away."""
    monkeypatch.setattr(lifeline, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lifeline, "GRACE_SECONDS", 0.05)
    port = free_port()
    held = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))]
    yield port, held
    held.clear()


class Pod:
    """A lifeline that remembers what it was told."""

    def __init__(self, port: int, node: int) -> None:
        self.loss = ""
        self.told = threading.Event()
        self.line = Lifeline("127.0.0.1", port, Watch(node, 2), self.lose, timedelta(seconds=60))
        self.line.start()

    def lose(self, loss: str) -> None:
        self.loss = loss
        self.told.set()

    def joined(self) -> bool:
        while self.line._store is None:
            self.told.wait(0.01)
        return True


def test_a_failure_reaches_the_other_pod(store: tuple[int, list[TCPStore]]) -> None:
    pods = [Pod(store[0], node) for node in (0, 1)]
    assert all(pod.joined() for pod in pods)
    pods[1].line.end(well=False)
    assert pods[0].told.wait(10)
    assert pods[0].loss == "a rank of pod 1 ended"
    assert not pods[1].told.is_set()
    pods[0].line.end(well=False)


def test_a_good_end_does_not(store: tuple[int, list[TCPStore]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 0.2)
    pods = [Pod(store[0], node) for node in (0, 1)]
    assert all(pod.joined() for pod in pods)
    pods[1].line.end(well=True)
    assert not pods[0].told.wait(0.6)
    pods[0].line.end(well=True)


def test_a_pod_that_vanishes_is_missed(
    store: tuple[int, list[TCPStore]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 0.2)
    pods = [Pod(store[0], node) for node in (0, 1)]
    assert all(pod.joined() for pod in pods)
    pods[1].line._over.set()  # stops counting without a word
    assert pods[0].told.wait(10)
    assert pods[0].loss.startswith("pod 1 has been silent")
