"""Which tokens the next step runs: pure bookkeeping, no torch, no threads.

Requests are admitted in order of arrival while their caches fit, and the admitted ones take turns, one step
each, so a short question is not kept waiting by a long answer. A prompt is run in chunks for the same reason.
Room is set aside for what a sequence has and a little more, not for the longest answer it could get; when the
caches grow into their limit, the youngest sequence waits and is run again from its beginning.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from yuan2_server.sequence import Entry

HEADROOM = 64
"""Tokens of an answer for which room is set aside beforehand."""


@dataclass(frozen=True)
class Limits:
    """What the engine may hand out."""

    max_sequences: int
    """Requests that run or wait; one more is refused."""
    max_cached_tokens: int
    """Tokens that the caches of all running sequences may hold; one sequence always runs."""
    prefill_chunk: int = 512
    """Prompt tokens of one step."""


@dataclass(frozen=True)
class Slice:
    """Positions `start` to `end` of one sequence, to be run in a step."""

    sequence: Entry
    start: int
    end: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens at these positions."""
        return self.sequence.tokens(self.start, self.end)

    @property
    def is_last(self) -> bool:
        """Whether the step reaches the last token: it gives the next one, or the text's vector."""
        return self.end == self.sequence.length


class Scheduler:
    """The running sequences, in the order of their next turn, and the waiting ones, in order of arrival."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Entry] = deque()
        self._running: deque[Entry] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> tuple[Entry, ...]:
        """Sequences that hold a cache."""
        return tuple(self._running)

    def all(self) -> tuple[Entry, ...]:
        """Every sequence here, running ones first."""
        return (*self._running, *self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens that are set aside for the caches of the running sequences."""
        return sum(map(_room, self._running))

    def add(self, sequence: Entry) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: Entry) -> bool:
        """Forget a sequence, wherever it is; False when it is not here (any more)."""
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
                return True
        return False

    def evict(self) -> list[Entry]:
        """Sequences whose caches must go, for those of older ones have grown; they are first in line."""
        evicted: list[Entry] = []
        while len(self._running) > 1 and self.cached_tokens > self.limits.max_cached_tokens:
            youngest = max(self._running, key=lambda sequence: sequence.id)
            self._running.remove(youngest)
            youngest.computed = 0
            self._waiting.appendleft(youngest)
            evicted.append(youngest)
        return evicted

    def schedule(self) -> tuple[Slice, ...]:
        """The work of the next step; empty when there is none. A sequence that had its turn goes to the
        end."""
        self._admit()
        if not self._running:
            return ()
        sequence = self._running[0]
        self._running.rotate(-1)
        end = min(sequence.length, sequence.computed + self.limits.prefill_chunk)
        return (Slice(sequence, sequence.computed, end),)

    def _admit(self) -> None:
        """Newcomers are next, in their order: a first token matters more than another's hundredth."""
        newcomers: list[Entry] = []
        room = self.limits.max_cached_tokens - self.cached_tokens
        while self._waiting:
            needed = _room(self._waiting[0])
            if needed > room and (self._running or newcomers):
                break
            newcomers.append(self._waiting.popleft())
            room -= needed
        self._running.extendleft(reversed(newcomers))


def _room(sequence: Entry) -> int:
    return min(sequence.longest, sequence.length + HEADROOM)
