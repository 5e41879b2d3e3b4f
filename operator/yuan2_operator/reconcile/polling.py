"""Asking the pods of rank 0 for their progress, beside the passes.

A pass never waits for a pod: it reads what was last heard. Each followed pod is asked in a task of its own;
how many are asked at the same time is bounded, and those that were silent the last time wait for each other
only, so that they cost the others nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

from yuan2_core.contract import Progress
from yuan2_operator.observe import Silent
from yuan2_operator.queue import Key
from yuan2_operator.status.progress import worth_a_pass

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Pods that answer, asked at the same time."""
SILENT_AT_ONCE = 8
"""Pods that were silent the last time, asked at the same time."""
SILENCE_SECONDS = 60.0
"""A silence that is longer is told in the status."""
SILENT_POLL_SECONDS = 30.0
"""Seconds between two questions to a pod whose silence has been told."""


@dataclass(frozen=True)
class Target:
    """A pod of rank 0."""

    pod: str
    ip: str | None
    attempt: int


@dataclass(frozen=True)
class Word:
    """What is known of a pod that is asked."""

    progress: Progress | None = None
    """Its last answer; None while it is silent."""
    silence: str | None = None
    """Why it has not answered for `SILENCE_SECONDS`: a clause; None while it does."""


Ask = Callable[[str, str, str | None], Awaitable[Progress]]
"""Namespace, pod and IP to what it says; raises `Silent`."""


@dataclass
class _Followed:
    """A target, and what it has said."""

    target: Target
    since: datetime
    """Last answer or, before the first, when it was first followed."""
    task: asyncio.Task[None] | None = None
    progress: Progress | None = None
    told: Progress | None = None
    """What it had said when a pass was last asked for."""
    told_at: datetime | None = None
    silent: bool = False
    """The last question had no answer."""
    complaint: str | None = None
    """Why, once that has lasted."""


@dataclass
class Poller:
    """Follows one pod a run."""

    ask: Ask
    wake: Callable[[Key], None]
    """Asks for a pass."""
    seconds: float
    """Between two questions to a pod that answers."""
    clock: Callable[[], datetime]
    _followed: dict[Key, _Followed] = field(default_factory=dict)
    _speaking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    _silent: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SILENT_AT_ONCE))

    def hear(self, key: Key, target: Target | None) -> Word:
        """What the pod of a run has said; from now on it, and no other of that run, is asked.

        Without `target` nobody is asked any more.
        """
        known = self._followed.get(key)
        if known is not None and known.target != target:
            self.drop(key)
            known = None
        if target is None:
            return Word()
        if known is None:
            known = self._followed[key] = _Followed(target, self.clock())
            known.task = asyncio.create_task(self._follow(key, known), name=f"progress of {key}")
        return Word(silence=known.complaint) if known.silent else Word(known.progress)

    def words(self) -> list[tuple[Key, Progress]]:
        """What the pods that answer have last said, by run."""
        return [
            (key, known.progress)
            for key, known in self._followed.items()
            if known.progress is not None and not known.silent
        ]

    def drop(self, key: Key) -> None:
        """Ask no pod of this run any more."""
        known = self._followed.pop(key, None)
        if known is not None and known.task is not None:
            known.task.cancel()

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = [known.task for known in self._followed.values() if known.task is not None]
        for key in list(self._followed):
            self.drop(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, key: Key, known: _Followed) -> None:
        while True:
            async with self._silent if known.silent else self._speaking:
                said, silence = await self._question(key, known.target)
            if self._note(known, said, silence):
                self.wake(key)
            patient = known.complaint is not None
            await asyncio.sleep(max(self.seconds, SILENT_POLL_SECONDS) if patient else self.seconds)

    async def _question(self, key: Key, target: Target) -> tuple[Progress | None, str | None]:
        try:
            said = await self.ask(key.namespace, target.pod, target.ip)
        except Silent as error:
            logger.debug("%s: no progress: %s", key, error)
            return None, str(error)
        if (said.name, said.attempt) != (key.name, target.attempt):
            return None, f"pod {target.pod} answers for attempt {said.attempt} of {said.name}"
        return said, None

    def _note(self, known: _Followed, said: Progress | None, silence: str | None) -> bool:
        """Keep an answer; gives whether it is worth a pass."""
        now = self.clock()
        if said is None:
            return self._note_silence(known, silence, now)
        again = known.complaint is not None
        known.progress, known.silent, known.complaint, known.since = said, False, None, now
        passed = (now - known.told_at).total_seconds() if known.told_at is not None else 0.0
        if not again and not worth_a_pass(known.told, said, passed):
            return False
        known.told, known.told_at = said, now
        return True

    def _note_silence(self, known: _Followed, silence: str | None, now: datetime) -> bool:
        """A silence is news once, when it has lasted; its cause may change later, which is not."""
        known.silent = True
        if known.complaint is not None or (now - known.since).total_seconds() < SILENCE_SECONDS:
            return False
        known.complaint = silence
        return True
