"""A work queue of keys: each key once, one worker a key at a time, retries with backoff, wake-ups by time.

The semantics of client-go's rate-limited workqueue: a key added while it is being worked on is worked on
once more afterwards; a failed key comes back after a growing delay; a success forgets the failures.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from yuan2_operator.logs import about

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.05
"""How long a key waits for more events of the same burst before it is worked on."""
BACKOFF_FIRST_SECONDS = 0.5
BACKOFF_LIMIT_SECONDS = 60.0


class Key(NamedTuple):
    """One custom resource."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


Process = Callable[[Key], Awaitable[float | None]]
"""Works on one key; returns the seconds after which it wants to be called again, or None."""


def backoff(failures: int, hint: float | None = None) -> float:
    """Seconds to wait after that many failures in a row; a server's own `hint` (Retry-After) is a minimum."""
    seconds = min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, 16), BACKOFF_LIMIT_SECONDS)
    return max(seconds, hint or 0.0)


class WorkQueue:
    """Keys that wait, keys being worked on, and the clock that brings keys back."""

    def __init__(self, process: Process, *, workers: int = 8, settle: float = SETTLE_SECONDS) -> None:
        self._process = process
        self._workers = workers
        self._settle = settle
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._active: dict[Key, float] = {}
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def __len__(self) -> int:
        """Keys that wait for a worker now."""
        return len(self._queued)

    def add(self, key: Key, delay: float | None = None) -> None:
        """Have `key` worked on after `delay` seconds (by default when its burst of events has settled).

        The earliest of several wishes wins.
        """
        if key in self._queued:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + (self._settle if delay is None else delay)
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._release, key)

    def longest_pass(self) -> float:
        """Seconds that the oldest pass under way has taken; 0 when none is."""
        return asyncio.get_running_loop().time() - min(self._active.values()) if self._active else 0.0

    def start(self, after: asyncio.Event | None = None) -> list[asyncio.Task[None]]:
        """Begin to work, once `after` is set; the tasks run until they are cancelled, and passes under way
        are cancelled with them."""
        return [
            asyncio.create_task(self._work(after), name=f"worker {number}") for number in range(self._workers)
        ]

    def _release(self, key: Key) -> None:
        self._timers.pop(key, None)
        if key in self._active:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    async def _work(self, after: asyncio.Event | None) -> None:
        if after is not None:
            await after.wait()
        worker = asyncio.current_task()
        # A pass can swallow the cancellation: before Python 3.12 `wait_for` does, if what it awaits is done.
        while worker is None or not worker.cancelling():  # type: ignore[attr-defined]  # the operator needs 3.11
            key = await self._ready.get()
            self._queued.discard(key)
            self._active[key] = asyncio.get_running_loop().time()
            try:
                delay = await self._attempt(key)
            finally:
                del self._active[key]
            self._finish(key, delay)

    async def _attempt(self, key: Key) -> float | None:
        try:
            delay = await self._process(key)
        except Exception as error:  # noqa: BLE001 - whatever a pass dies of, the key comes back and the others go on
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = backoff(failures, getattr(error, "retry_after", None))
            log = logger.warning if failures <= 1 or not _surprising(error) else logger.exception
            with about(kind=key.kind, namespace=key.namespace, name=key.name):
                log("%s: %s: %s; again in %.1f s", key, type(error).__name__, error, delay)
            return delay
        self._failures.pop(key, None)
        return delay

    def _finish(self, key: Key, delay: float | None) -> None:
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        elif delay is not None:
            self.add(key, delay)


def _surprising(error: Exception) -> bool:
    """Not an answer of the API server: worth a traceback."""
    return not hasattr(error, "retry_after")
