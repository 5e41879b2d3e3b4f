"""The loop that generates: `step()` = schedule -> run -> postprocess, on a thread of its own.

Other threads only put commands into the engine's inbox; sequences, scheduler and caches belong to the
engine's thread. The engine knows token ids, not text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from yuan2_server.protocol import ErrorCode, FinishReason, RequestError
from yuan2_server.scheduler import Limits, Scheduler, Slice
from yuan2_server.sequence import SampledToken, Sequence

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")


class Runner(Protocol):
    """Runs the model and keeps the caches (`runner.ModelRunner`)."""

    def run(self, work: tuple[Slice, ...]) -> list[Tensor]:
        """Logits [V] after the last position of each slice."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop the cache of a sequence."""
        ...


class TokenSampler(Protocol):
    """Chooses tokens (`sampler.Sampler`)."""

    def sample(self, logits_V: Tensor, sequence: Sequence) -> SampledToken:
        """The next token, from logits [V]."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence."""
        ...


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, as of its last step."""

    running: int = 0
    """Sequences that hold a cache."""
    cached_tokens: int = 0
    """Tokens that these caches hold at their longest."""


class Engine:
    """Generates for all sequences that were submitted and not cancelled."""

    def __init__(self, runner: Runner, sampler: TokenSampler, limits: Limits) -> None:
        self._runner = runner
        self._sampler = sampler
        self._scheduler = Scheduler(limits)
        self._limits = limits
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._load = 0
        self.stats = EngineStats()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def load(self) -> int:
        """Sequences that run or wait."""
        return self._load

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; unfinished sequences fail."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its tokens go to its sink. Raises RequestError (rate limit) when the queue is
        full."""
        with self._lock:
            if self._load >= self._limits.max_sequences:
                raise RequestError(
                    ErrorCode.RATE_LIMIT,
                    f"this worker takes {self._load} requests at once and has as many; try again later",
                )
            self._load += 1
        self._inbox.put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Give up a sequence: its cache is free within one step and its sink hears nothing more."""
        self._inbox.put(lambda: self._drop(sequence))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something else on the engine's thread, between two steps (embeddings)."""
        future: Future[T] = Future()
        self._inbox.put(lambda: _settle(future, function))
        return future

    def step(self) -> bool:
        """Run the next piece of work; False when there is none."""
        work = self._scheduler.schedule()
        if not work:
            return False
        try:
            for piece, logits_V in zip(work, self._runner.run(work)):  # noqa: B905 -- same length by contract
                self._postprocess(piece, logits_V)
        except Exception as error:  # noqa: BLE001 -- one request's failure must not end the others'
            self._fail(work, error)
        self.stats = EngineStats(len(self._scheduler.running), self._scheduler.cached_tokens)
        return True

    def _postprocess(self, piece: Slice, logits_V: Tensor) -> None:
        sequence, samples = piece.sequence, piece.samples
        sequence.computed = piece.end
        if samples:
            reason = sequence.append(self._sampler.sample(logits_V, sequence))
            if reason is not None:
                self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._drop(sequence)
        sequence.sink.finish(reason)

    def _fail(self, work: tuple[Slice, ...], error: Exception) -> None:
        log.error("step failed", exc_info=error)
        for piece in work:
            self._drop(piece.sequence)
            piece.sequence.sink.fail(as_request_error(error))

    def _drop(self, sequence: Sequence) -> None:
        if self._scheduler.remove(sequence):
            self._runner.forget(sequence)
            self._sampler.forget(sequence)
            with self._lock:
                self._load -= 1

    def _loop(self) -> None:
        busy = False
        while self._obey(wait=not busy):
            busy = self.step()

    def _obey(self, *, wait: bool) -> bool:
        """Run the commands that are there, at least one if `wait`; False when one was to close."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                self._abandon()
                return False
            command()
            wait = False

    def _abandon(self) -> None:
        error = RequestError(ErrorCode.ENGINE_OVERLOADED, "this worker is shutting down; try again")
        for sequence in self._scheduler.all():
            self._drop(sequence)
            sequence.sink.fail(error)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 -- the waiting thread gets it
        future.set_exception(error)


def as_request_error(error: Exception) -> RequestError:
    """What a client is told about an exception of ours: its kind, not its text."""
    if isinstance(error, RequestError):
        return error
    return RequestError(ErrorCode.INTERNAL_ERROR, f"the worker failed ({type(error).__name__}); see its log")
