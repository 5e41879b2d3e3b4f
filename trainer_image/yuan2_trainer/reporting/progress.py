"""What is known of a running attempt: kept by rank 0, read by the launcher, which answers for it.

The launcher serves, so that a rank that hangs in a collective does not silence the very number that would
show it (`lastStepAgeSeconds`). Times that cross the two processes are `time.monotonic()`, one clock on a
Linux machine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from yuan2_core.contract import Measurements, Progress, TrainState
from yuan2_trainer.pod.workspace import Workspace, read_text, replace

BEAT_SECONDS = 1.0
"""So often, at most, a long piece of work says that it goes on."""
RECENT_STEPS = 20
"""Steps that the rate of tokens and the remaining time are averaged over."""


class Snapshot(Measurements):
    """Measurements, and what the launcher needs to tell ages and the remaining time at any moment."""

    state: TrainState = "starting"
    step_seconds: float | None = None
    """Mean duration of recent steps."""
    last_step_at: float | None = None
    state_since: float | None = None
    """When `state` last changed."""


@dataclass(frozen=True)
class StepReport:
    """The numbers of one optimizer step."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch, padding not counted."""
    labelled_tokens: int
    seconds: float
    mfu: float | None = None
    memory_bytes: int | None = None
    rewards: dict[str, float] | None = None
    """What answers are worth to the model, where they are compared: `chosen`, `rejected`, `margin` and, of
    pairs, `accuracy`; with KTO `kl`."""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True)
class EvaluationReport:
    """The numbers of one evaluation."""

    step: int
    """Optimizer steps done before it."""
    epoch: float
    eval_loss: float
    """Mean loss over the labelled tokens of the held-out data."""
    perplexity: float
    """Its exponential."""
    rewards: dict[str, float] | None = None
    """As of a step."""


@dataclass
class Tracker:
    """Folds step reports into a snapshot and leaves it in the workspace."""

    workspace: Workspace
    snapshot: Snapshot = field(default_factory=Snapshot)
    clock: Callable[[], float] = time.monotonic
    _recent: deque[StepReport] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _told_at: float = -math.inf

    def update(self, **changes: object) -> None:
        if changes.get("state", self.snapshot.state) != self.snapshot.state:
            changes["state_since"] = self.clock()
        self.snapshot = self.snapshot.model_copy(update=changes)
        replace(self.workspace.progress, self.snapshot.model_dump_json())

    def beat(self) -> None:
        """Say that this rank is alive and at work; as often as anybody likes."""
        now = self.clock()
        if now - self._told_at >= BEAT_SECONDS:
            self._told_at = now
            self.update(last_step_at=now)

    def after_step(self, report: StepReport, now: float) -> None:
        self._recent.append(report)
        seconds = sum(item.seconds for item in self._recent)
        tokens = sum(item.tokens for item in self._recent)
        used = sum((item.mfu or 0.0) * item.seconds for item in self._recent)
        self.update(
            state="training",
            step=report.step,
            epoch=report.epoch,
            loss=report.loss,
            learning_rate=report.learning_rate,
            grad_norm=report.grad_norm,
            tokens_per_second=tokens / seconds if seconds else None,
            mfu=used / seconds if seconds and report.mfu is not None else None,
            memory_bytes=report.memory_bytes,
            step_seconds=seconds / len(self._recent),
            last_step_at=now,
            seconds_in_steps=self.snapshot.seconds_in_steps + report.seconds,
        )


def read_snapshot(workspace: Workspace) -> Snapshot:
    """The last snapshot, or that of an attempt which has not begun."""
    text = read_text(workspace.progress)
    return Snapshot() if text is None else Snapshot.model_validate_json(text)


def progress_at(snapshot: Snapshot, name: str, attempt: int, started_at: float, now: float) -> Progress:
    """A snapshot as the operator reads it at `now`; ages and the remaining time grow or shrink between
    steps."""
    age = _age(snapshot.last_step_at, now)
    return Progress(
        name=name,
        attempt=attempt,
        last_step_age_seconds=age,
        state_age_seconds=_age(snapshot.state_since, now),
        eta_seconds=_eta(snapshot, age),
        seconds_total=now - started_at,
        **snapshot.model_dump(exclude={"step_seconds", "last_step_at", "state_since"}),
    )


def _age(moment: float | None, now: float) -> float | None:
    return None if moment is None else max(0.0, now - moment)


def _eta(snapshot: Snapshot, age: float | None) -> float | None:
    if snapshot.step_seconds is None or age is None:
        return None
    left = (snapshot.total_steps - snapshot.step) * snapshot.step_seconds
    return max(0.0, left - min(age, snapshot.step_seconds))
