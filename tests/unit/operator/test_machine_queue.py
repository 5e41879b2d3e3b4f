"""The work queue: each key once, one worker a key, retries that back off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from yuan2_operator.client import Unavailable
from yuan2_operator.queue import BACKOFF_LIMIT_SECONDS, Key, WorkQueue, backoff

A, B = Key("Yuan2FineTune", "demo", "a"), Key("Yuan2FineTune", "demo", "b")


@contextlib.asynccontextmanager
async def working(process, workers: int = 4) -> AsyncIterator[WorkQueue]:
    queue = WorkQueue(process, workers=workers, settle=0.0)
    tasks = queue.start()
    try:
        yield queue
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


async def test_a_burst_of_events_is_one_pass():
    passes = []

    async def process(key):
        passes.append(key)

    async with working(process) as queue:
        for _ in range(10):
            queue.add(A)
        await until(lambda: passes)
        await asyncio.sleep(0.05)
    assert passes == [A]


async def test_a_key_is_never_worked_on_twice_at_once_and_news_are_not_lost():
    under_way, most, passes = 0, 0, 0
    release = asyncio.Event()

    async def process(key):
        nonlocal under_way, most, passes
        under_way, passes = under_way + 1, passes + 1
        most = max(most, under_way)
        await release.wait()
        under_way -= 1

    async with working(process) as queue:
        queue.add(A)
        await until(lambda: under_way == 1)
        queue.add(A)
        await asyncio.sleep(0.05)
        assert passes == 1
        release.set()
        await until(lambda: passes == 2)
    assert most == 1


async def test_different_keys_are_worked_on_side_by_side():
    meeting = asyncio.Event()
    seen = set()

    async def process(key):
        seen.add(key)
        if len(seen) == 2:
            meeting.set()
        await asyncio.wait_for(meeting.wait(), timeout=2)

    async with working(process) as queue:
        queue.add(A)
        queue.add(B)
        await until(meeting.is_set)


async def test_a_pass_that_swallows_its_cancellation_ends_the_worker_too():
    under_way = asyncio.Event()

    async def process(key):
        under_way.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    queue = WorkQueue(process, workers=1, settle=0.0)
    (worker,) = queue.start()
    queue.add(A)
    await under_way.wait()
    worker.cancel()
    done, _ = await asyncio.wait([worker], timeout=5)
    worker.cancel()
    assert done == {worker}


async def test_a_failed_key_comes_back_and_success_forgets():
    outcomes = [ValueError("boom"), Unavailable("no answer"), None]
    passes = []

    async def process(key):
        passes.append(key)
        outcome = outcomes.pop(0) if outcomes else None
        if outcome is not None:
            raise outcome

    async with working(process) as queue:
        queue.add(A)
        await until(lambda: len(passes) == 3)
        await asyncio.sleep(0.05)
        assert queue._failures == {}
    assert len(passes) == 3


async def test_a_pass_names_the_time_of_the_next_and_an_event_comes_first():
    passes = []

    async def process(key):
        passes.append(key)
        return 60.0 if len(passes) == 1 else None

    async with working(process) as queue:
        queue.add(A)
        await until(lambda: len(passes) == 1)
        queue.add(A)
        await until(lambda: len(passes) == 2)
        assert queue.longest_pass() == 0.0


async def test_the_sooner_of_two_wishes_wins():
    passes = []

    async def process(key):
        passes.append(key)

    async with working(process) as queue:
        queue.add(A, 30.0)
        queue.add(A, 0.01)
        queue.add(A, 20.0)
        await until(lambda: passes)


@pytest.mark.parametrize(("failures", "seconds"), [(1, 0.5), (2, 1.0), (5, 8.0), (99, BACKOFF_LIMIT_SECONDS)])
def test_delays_grow_to_a_limit(failures, seconds):
    assert backoff(failures) == seconds


def test_the_servers_own_wish_is_a_minimum():
    assert backoff(1, 7.0) == 7.0
    assert backoff(10, 1.0) == BACKOFF_LIMIT_SECONDS
