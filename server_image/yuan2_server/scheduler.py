"""Which tokens the next step runs: pure bookkeeping, no torch, no threads.

Requests are admitted in order of arrival while their caches fit, and the admitted ones take turns, one step
each, so a short question is not kept waiting by a long answer. A prompt is run in chunks for the same reason.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from yuan2_server.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """What the scheduler may hand out."""

    max_sequences: int
    """Sequences that run or wait; one more is refused."""
    max_cached_tokens: int
    """Tokens the caches of all running sequences may hold at their longest; one sequence always runs."""
    prefill_chunk: int = 512
    """Prompt tokens of one step."""


class QueueFullError(Exception):
    """`Limits.max_sequences` are running or waiting already."""


@dataclass(frozen=True)
class Slice:
    """Positions `start` to `end` of one sequence, to be run in a step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens at these positions."""
        return self.sequence.tokens(self.start, self.end)

    @property
    def samples(self) -> bool:
        """Whether the step reaches the last token, so that its logits choose the next one."""
        return self.end == self.sequence.length


class Scheduler:
    """The running sequences, in the order of their next turn, and the waiting ones, in order of arrival."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that hold a cache."""
        return tuple(self._running)

    def all(self) -> tuple[Sequence, ...]:
        """Every sequence here, running ones first."""
        return (*self._running, *self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens the caches of the running sequences hold at their longest."""
        return sum(sequence.longest for sequence in self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFullError."""
        if len(self) >= self.limits.max_sequences:
            raise QueueFullError
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence, wherever it is; False when it is not here (any more)."""
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
                return True
        return False

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
        while self._waiting and self._fits(self._waiting[0]):
            # The newcomer is next: its first token matters more than another's hundredth.
            self._running.appendleft(self._waiting.popleft())

    def _fits(self, sequence: Sequence) -> bool:
        return not self._running or self.cached_tokens + sequence.longest <= self.limits.max_cached_tokens
