"""Asking pods beside the passes: who is asked, what is worth a pass, and what a silence costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.support.attempts import START
from tests.support.finetunes import progress_of
from yuan2_core.contract import Progress
from yuan2_operator.observe import Silent
from yuan2_operator.queue import Key
from yuan2_operator.reconcile.polling import SILENT_AT_ONCE, Poller, Target, Word
from yuan2_operator.status.progress import worth_a_pass

KEY = Key("Yuan2FineTune", "demo", "x")
POD = Target("x-1-0", "10.0.0.1", 1)


class Pods:
    """Pods that say what a test has prepared, and a clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now: datetime = START
        self.says: Progress | Exception = progress_of("x", step=1)
        self.asked: list[str] = []
        self.woken: list[Key] = []
        self.question = asyncio.Condition()
        self.stuck = asyncio.Event()
        self.poller = Poller(self.ask, self.woken.append, 0.001, lambda: self.now)

    async def ask(self, namespace: str, pod: str, ip: str | None) -> Progress:
        async with self.question:
            self.asked.append(pod)
            self.question.notify_all()
        if pod.startswith("stuck"):
            await self.stuck.wait()
            raise Silent("no answer")
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def rounds(self, count: int = 3) -> None:
        """Wait until so many more questions were asked and answered."""
        wanted = len(self.asked) + count
        async with self.question:
            await self.question.wait_for(lambda: len(self.asked) >= wanted)
        await asyncio.sleep(0)


@pytest.fixture
async def pods(monkeypatch) -> AsyncIterator[Pods]:
    monkeypatch.setattr("yuan2_operator.reconcile.polling.SILENT_POLL_SECONDS", 0.0)
    made = Pods()
    yield made
    made.stuck.set()
    await made.poller.close()


async def test_nothing_is_known_before_the_first_answer_which_asks_for_a_pass(pods):
    assert pods.poller.hear(KEY, POD) == Word()
    await pods.rounds()
    assert pods.poller.hear(KEY, POD) == Word(progress_of("x", step=1))
    assert pods.woken == [KEY]


async def test_an_answer_that_says_little_new_asks_for_no_pass(pods):
    pods.poller.hear(KEY, POD)
    await pods.rounds()
    pods.says = progress_of("x", step=20)
    await pods.rounds()
    assert pods.woken == [KEY]
    pods.says = progress_of("x", step=21)
    await pods.rounds()
    assert pods.woken == [KEY, KEY]
    assert pods.poller.hear(KEY, POD).progress.step == 21


async def test_a_short_silence_is_no_news_and_leaves_nothing_to_judge_by(pods):
    pods.poller.hear(KEY, POD)
    await pods.rounds()
    pods.says = Silent("no answer")
    pods.now += timedelta(seconds=59)
    await pods.rounds()
    assert pods.poller.hear(KEY, POD) == Word()
    assert pods.woken == [KEY]


async def test_a_silence_that_lasts_is_told_once_with_its_first_cause_and_so_is_its_end(pods):
    pods.poller.hear(KEY, POD)
    await pods.rounds()
    pods.says = Silent("no answer")
    pods.now += timedelta(seconds=60)
    await pods.rounds()
    pods.says = Silent("another cause")
    pods.now += timedelta(seconds=600)
    await pods.rounds()
    assert pods.poller.hear(KEY, POD) == Word(silence="no answer")
    assert pods.woken == [KEY, KEY]
    pods.says = progress_of("x", step=2)
    await pods.rounds()
    assert pods.poller.hear(KEY, POD) == Word(progress_of("x", step=2))
    assert pods.woken == [KEY, KEY, KEY]


@pytest.mark.parametrize("stranger", [progress_of("y"), progress_of("x", attempt=2)])
async def test_another_runs_pod_behind_the_same_address_is_not_believed(pods, stranger):
    pods.says = stranger
    pods.poller.hear(KEY, POD)
    pods.now += timedelta(seconds=60)
    await pods.rounds()
    who = f"attempt {stranger.attempt} of {stranger.name}"
    assert pods.poller.hear(KEY, POD) == Word(silence=f"pod x-1-0 answers for {who}")


async def test_of_a_run_only_the_newest_pod_is_asked(pods):
    pods.poller.hear(KEY, POD)
    await pods.rounds()
    assert pods.poller.hear(KEY, Target("x-2-0", "10.0.0.2", 2)) == Word()
    pods.says = progress_of("x", attempt=2)
    await pods.rounds()
    pods.asked.clear()
    await pods.rounds()
    assert set(pods.asked) == {"x-2-0"}
    assert pods.poller.hear(KEY, None) == Word()
    pods.asked.clear()
    await asyncio.sleep(0.01)
    assert pods.asked == []


async def test_silent_pods_wait_for_each_other_and_not_for_those_that_answer(pods):
    keys = [Key("Yuan2FineTune", "demo", f"stuck-{number}") for number in range(3 * SILENT_AT_ONCE)]
    for key in keys:
        pods.poller.hear(key, Target(key.name, "10.0.0.9", 1))
    await asyncio.sleep(0.005)
    pods.stuck.set()
    await pods.rounds(3 * SILENT_AT_ONCE)
    pods.stuck.clear()
    await asyncio.sleep(0.01)
    waiting = len(pods.poller._silent._waiters or ())
    assert waiting == 2 * SILENT_AT_ONCE
    pods.poller.hear(KEY, POD)
    pods.asked.clear()
    await pods.rounds(20)
    assert set(pods.asked) == {"x-1-0"}


def told(seconds: float = 0.0, **changes: Any) -> bool:
    known = progress_of("x", step=10)
    return worth_a_pass(known, known.model_copy(update=changes), seconds)


def test_what_is_worth_a_pass():
    assert worth_a_pass(None, progress_of("x"), 0.0)
    assert not told(59.9, step=29, loss=1.0, last_step_age_seconds=9.0)
    assert told(0.0, step=30)
    assert told(60.0)
    for name, value in (("state", "saving"), ("last_checkpoint_step", 5), ("samples", 3), ("best_step", 1)):
        assert told(**{name: value})
    assert not worth_a_pass(progress_of("x", total=0), progress_of("x", step=9, total=0), 0.0)
