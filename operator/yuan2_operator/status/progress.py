"""The trainer's progress as fields of a status, and when those fields are worth a write. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from yuan2_core.contract import Progress
from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.constants import CONDITION_RUNNING, Reason
from yuan2_operator.plan.quantity import decimal_gigabytes

PROGRESS_FIELDS = frozenset(
    {
        "step",
        "total_steps",
        "progress",
        "loss",
        "learning_rate",
        "eval_loss",
        "best_step",
        "tokens_per_second",
        "mfu",
        "peak_memory",
        "samples",
        "tokens",
        "dropped_samples",
        "eta",
        "last_checkpoint_step",
        "last_checkpoint_time",
        "last_checkpoint_path",
        "epoch",
        "gpu_hours",
        "resumed_from_step",
    }
)
"""Fields that change with every step; all others are written as soon as they change."""
WRITE_SHARE = 0.2
"""Share of all steps after which progress is written, whatever the clock says."""
WRITE_SECONDS = 60.0
WORDS_SECONDS = 10.0
"""A status in which only the sentence of a condition changed is written no sooner after the last write."""
NEWS_KEPT = 6
"""Writes that may follow each other at once: one every ten seconds on average."""
WRITE_SECONDS_GROWTH = 1 / 60
"""A long run is written more rarely: seconds between writes as a share of its age."""


_CHANGING = (Reason.STARTING, Reason.UNSCHEDULABLE)
"""Reasons of Running whose sentences count pods and nodes, and so change without being news."""
_TURNS = ("state", "total_steps", "samples", "last_checkpoint_step", "resumed_from_step", "best_step")
"""What a run says only now and then, and a reader wants to see soon."""


@dataclass(frozen=True)
class Written:
    """The last writes of a status."""

    step: int
    at: datetime
    recent: tuple[datetime, ...] = ()
    """The last `NEWS_KEPT`, oldest first."""

    def rest(self, now: datetime) -> float:
        """Seconds until news may be written again."""
        if len(self.recent) < NEWS_KEPT:
            return 0.0
        return max(0.0, NEWS_KEPT * WORDS_SECONDS - (now - self.recent[0]).total_seconds())


def written(last: Written | None, prior: FineTuneStatus, status: FineTuneStatus, now: datetime) -> Written:
    """With one write more; another attempt, which waits for its turn anyway, has its news before it."""
    goes_on = last is not None and _decided(prior) == _decided(status)
    earlier = last.recent if last is not None and goes_on else ()
    return Written(status.step or 0, now, (*earlier, now)[-NEWS_KEPT:])


def progress_fields(progress: Progress, prior: FineTuneStatus, now: datetime) -> dict[str, Any]:
    """Fields of a status that `progress` decides, by name."""
    return {
        "step": progress.step,
        "total_steps": progress.total_steps or None,
        "epoch": round(progress.epoch, 2),
        "progress": f"{progress.step}/{progress.total_steps}" if progress.total_steps else None,
        "loss": _rounded(progress.loss, 4),
        "learning_rate": progress.learning_rate,
        "eval_loss": prior.eval_loss if progress.eval_loss is None else round(progress.eval_loss, 4),
        "best_step": prior.best_step if progress.best_step is None else progress.best_step,
        "tokens_per_second": _rounded(progress.tokens_per_second, 1),
        "mfu": _rounded(progress.mfu, 3),
        "peak_memory": None if progress.memory_bytes is None else decimal_gigabytes(progress.memory_bytes),
        "samples": progress.samples or None,
        "tokens": progress.tokens or None,
        "dropped_samples": progress.dropped_samples or None,
        "eta": None if progress.eta_seconds is None else duration_text(progress.eta_seconds),
        "last_checkpoint_step": progress.last_checkpoint_step,
        "last_checkpoint_time": _checkpoint_time(progress, prior, now),
        "resumed_from_step": progress.resumed_from_step,
        "first_step_time": prior.first_step_time or _first_step(progress, now),
    }


def worth_writing(prior: FineTuneStatus, status: FineTuneStatus, last: Written | None, now: datetime) -> bool:
    """Whether `status` must be written now."""
    return write_delay(prior, status, last, now) == 0


def write_delay(
    prior: FineTuneStatus, status: FineTuneStatus, last: Written | None, now: datetime
) -> float | None:
    """Seconds until `status` must be written; None: when there is more to tell.

    What is decided about attempts is written at once, since the next pass builds on it; other news as well,
    but no more than `NEWS_KEPT` times a minute of an attempt; sentences and progress by the clock.
    """
    if last is None:
        return None if prior == status else 0
    if _decided(prior) != _decided(status):
        return 0
    if _without_progress(prior) != _without_progress(status):
        if _without_words(prior) == _without_words(status):
            return max(last.rest(now), WORDS_SECONDS - (now - last.at).total_seconds())
        return last.rest(now)
    if prior == status:
        return None
    age = (now - status.start_time).total_seconds() if status.start_time is not None else 0.0
    if (now - last.at).total_seconds() >= max(WRITE_SECONDS, age * WRITE_SECONDS_GROWTH):
        return 0
    steps = abs((status.step or 0) - last.step)
    return last.rest(now) if steps >= WRITE_SHARE * (status.total_steps or float("inf")) else None


def worth_a_pass(known: Progress | None, said: Progress, seconds: float) -> bool:
    """Whether what rank 0 says is worth a pass over the run.

    Args:
        known: what it said when the last pass was asked for; None before the first.
        said: what it says now.
        seconds: time since then.
    """
    if known is None or seconds >= WRITE_SECONDS:
        return True
    if any(getattr(known, name) != getattr(said, name) for name in _TURNS):
        return True
    return said.step - known.step >= WRITE_SHARE * (said.total_steps or float("inf"))


def duration_text(seconds: float) -> str:
    """Seconds as kubectl prints ages: `45s`, `58m`, `2h5m`, `3d4h`."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if hours < 2:
        return f"{minutes}m"
    if days < 2:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"


def _checkpoint_time(progress: Progress, prior: FineTuneStatus, now: datetime) -> datetime | None:
    """When the newest checkpoint was first heard of."""
    if progress.last_checkpoint_step is None:
        return None
    known = progress.last_checkpoint_step == prior.last_checkpoint_step
    return prior.last_checkpoint_time or now if known else now


def _first_step(progress: Progress, now: datetime) -> datetime | None:
    """When the first step ended, reckoned back from what was seen later: all steps take about as long."""
    done = progress.step - (progress.resumed_from_step or 0)
    if done < 1 or progress.last_step_age_seconds is None:
        return None
    later = progress.seconds_in_steps * (done - 1) / done
    return now - timedelta(seconds=progress.last_step_age_seconds + later)


def _decided(status: FineTuneStatus) -> tuple[object, ...]:
    """What the next pass builds on: which attempts there are, how they ended, whether the run has."""
    ended = [(attempt.number, attempt.outcome, attempt.reason) for attempt in status.attempts]
    return ended, status.completion_time


def _without_progress(status: FineTuneStatus) -> Mapping[str, Any]:
    """The fields that are written at once: not progress, and not the sentence about pods that start
    normally."""
    fields = _settled(status)
    for condition in fields["conditions"]:
        if condition["type"] == CONDITION_RUNNING and condition["reason"] in _CHANGING:
            condition["message"] = ""
    return fields


def _without_words(status: FineTuneStatus) -> Mapping[str, Any]:
    """The same without any sentence of a condition."""
    fields = _settled(status)
    for condition in fields["conditions"]:
        condition["message"] = ""
    return fields


def _settled(status: FineTuneStatus) -> dict[str, Any]:
    fields = status.model_dump(exclude=set(PROGRESS_FIELDS))
    for attempt in fields["attempts"]:
        if attempt["outcome"] is None:
            attempt["gpu_hours"] = None
    return fields


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
