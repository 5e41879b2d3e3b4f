"""The loop that generates: `step()` = schedule -> run -> postprocess, on a thread of its own.

Other threads only put commands into the engine's inbox; sequences, scheduler and caches belong to the
engine's thread. The engine knows token ids, not text.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Gauge

from yuan2_server.engines.builtin.scheduler import Limits, Scheduler, Slice
from yuan2_server.engines.seam import as_request_error, full, gone, hangs
from yuan2_server.protocol import FinishReason
from yuan2_server.sequence import Embedding, Entry, SampledToken, Sequence

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

STEP_SECONDS = 600.0
"""A step that runs for longer is taken for one that never ends: the longest there is, 512 tokens of a prompt,
takes a second on a GPU and a minute on a few CPU cores."""


class Runner(Protocol):
    """Runs the model and keeps the caches (`runner.ModelRunner`)."""

    def run(self, work: tuple[Slice, ...]) -> list[Tensor]:
        """Of each slice the logits [V] after its last position; of one of an `Embedding` the vector [H] of
        the text so far."""
        ...

    def forget(self, sequence: Entry) -> None:
        """Drop the cache of a sequence."""
        ...

    def check(self) -> None:
        """Raise what the model raises even for a single token."""
        ...


class TokenSampler(Protocol):
    """Chooses tokens (`sampler.Sampler`)."""

    def sample(self, logits_V: Tensor, sequence: Sequence) -> SampledToken:
        """The next token, from logits [V]."""
        ...

    def forget(self, sequence: Entry) -> None:
        """Drop what is kept for a sequence."""
        ...


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, as of its last step."""

    running: int = 0
    """Sequences that hold a cache."""
    cached_tokens: int = 0
    """Tokens that are set aside for these caches."""


class BuiltinEngine:
    """`seam.Engine`: generates for all sequences that were submitted and not cancelled."""

    def __init__(
        self,
        runner: Runner,
        sampler: TokenSampler,
        limits: Limits,
        step_seconds: float = STEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._scheduler = Scheduler(limits)
        self._limits = limits
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._load = 0
        self._ended = ""
        self._step_seconds = step_seconds
        self._clock = clock
        self._step_began: float | None = None
        self.stats = EngineStats()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return self._load

    @property
    def problem(self) -> str:
        """Why nothing will be generated any more, in a sentence; empty while all is well."""
        began = self._step_began
        if self._ended or began is None:
            return self._ended
        seconds = self._clock() - began
        return hangs(seconds) if seconds > self._step_seconds else ""

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; unfinished sequences fail."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, sequence: Entry) -> None:
        """Queue a sequence; what comes of it goes to its sink.

        Raises RequestError: the queue is full (rate limit), or the engine does not work any more.
        """
        with self._lock:
            if self.problem:
                raise gone()
            if self._load >= self._limits.max_sequences:
                raise full(self._load)
            self._load += 1
            self._inbox.put(lambda: self._scheduler.add(sequence))

    def cancel(self, sequence: Entry) -> None:
        """Give up a sequence: its cache is free within one step and its sink hears nothing more."""
        self._inbox.put(lambda: self._drop(sequence))

    def add_metrics(self, registry: CollectorRegistry) -> None:
        """Gauges of caches and of what holds them."""

        def gauge(name: str, help_: str, value: Callable[[], float]) -> None:
            Gauge(name, help_, registry=registry).set_function(value)

        gauge("yuan2_worker_running_sequences", "Sequences that hold a cache.", lambda: self.stats.running)
        gauge(
            "yuan2_worker_cached_tokens",
            "Tokens that the caches of running sequences hold at their longest.",
            lambda: self.stats.cached_tokens,
        )

    def step(self) -> bool:
        """Run the next piece of work; False when there is none."""
        for evicted in self._scheduler.evict():
            self._runner.forget(evicted)
        work = self._scheduler.schedule()
        if not work:
            return False
        self._step_began = self._clock()
        try:
            for piece, output in zip(work, self._runner.run(work)):  # noqa: B905 -- same length by contract
                self._postprocess(piece, output)
        except Exception as error:  # noqa: BLE001 -- one request's failure must not end the others'
            self._fail(work, error)
        self._step_began = None
        self.stats = EngineStats(len(self._scheduler.running), self._scheduler.cached_tokens)
        return True

    def _postprocess(self, piece: Slice, output: Tensor) -> None:
        sequence = piece.sequence
        last, sequence.computed = piece.is_last, piece.end
        if not last:
            return
        if isinstance(sequence, Embedding):
            self._runner.forget(sequence)
            if sequence.append(output.tolist()):
                self._drop(sequence)
                sequence.sink.finish(sequence.vectors)
            return
        reason = sequence.append(self._sampler.sample(output, sequence))
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
        try:
            # Some errors stick: after a device-side assertion every call fails until the process is another.
            self._runner.check()
        except Exception as broken:  # noqa: BLE001 -- whatever it is, it goes into the status
            self._end(f"the model fails even for a single token: {type(broken).__name__}: {_line(broken)}")

    def _drop(self, sequence: Entry) -> None:
        if self._scheduler.remove(sequence):
            self._runner.forget(sequence)
            self._sampler.forget(sequence)
            with self._lock:
                self._load -= 1

    def _loop(self) -> None:
        busy = False
        try:
            while not self._ended and self._obey(wait=not busy):
                busy = self.step()
        except BaseException as error:
            self._end(f"the engine's thread failed: {type(error).__name__}: {_line(error)}")
            raise
        finally:
            self._end("the engine has stopped")
            self._abandon()

    def _end(self, reason: str) -> None:
        """From here on nothing is submitted; the first reason stays."""
        with self._lock:
            self._ended = self._ended or reason

    def _obey(self, *, wait: bool) -> bool:
        """Run the commands that are there, at least one if `wait`; False when one was to close."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _abandon(self) -> None:
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None:
                command()
        for sequence in self._scheduler.all():
            self._drop(sequence)
            sequence.sink.fail(gone())


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
