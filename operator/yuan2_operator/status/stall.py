"""Whether an attempt hangs, by the word of its rank 0 alone. Pure.

A pod that cannot be asked says nothing about its steps: a NetworkPolicy, a firewall or a missing right is no
hang. So only an answer counts, and only once all pods run: before, rank 0 waits for the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from yuan2_core.contract import Progress
from yuan2_operator.api.finetune import Attempt, FineTuneSpec
from yuan2_operator.plan.limits import phase_limit

RANKS_TOLD = 8
"""Ranks whose place a sentence tells; the operator's log has all stacks."""
_RANK = re.compile(r"^=== rank (\d+) \(pid \d+\) ===$", re.MULTILINE)
_FRAME = re.compile(r'File "([^"]*)", line (\d+) in (.+)')


@dataclass(frozen=True)
class Pulse:
    """How long rank 0 says that nothing has happened, and how long that may be."""

    state: str
    idle: float
    """Seconds."""
    limit: float
    """Seconds."""
    field: str
    """The field of the spec that changes the limit."""
    where: str = ""
    """Where the ranks are, in a few words for each."""

    @property
    def hangs(self) -> bool:
        """It has been too long."""
        return self.idle > self.limit

    @property
    def left(self) -> float:
        """Seconds until it will have been too long; not negative."""
        return max(0.0, self.limit - self.idle)

    @property
    def sentence(self) -> str:
        """What is wrong, and the way out."""
        what = "no optimizer step" if self.state == "training" else f"no end of {self.state}"
        return (
            f"rank 0 reports {what} for {self.idle:.0f} s, more than the {self.limit:.0f} s of {self.field}: "
            "a rank, the loader or the storage hangs; raise the limit if it is only slow"
            + (f"; {self.where}" if self.where else "")
        )


def take_pulse(
    spec: FineTuneSpec, progress: Progress | None, attempt: Attempt | None, now: datetime
) -> Pulse | None:
    """The pulse of the open attempt by what rank 0 has just said; None where nobody can tell."""
    if progress is None or attempt is None or attempt.running_time is None:
        return None
    limit = phase_limit(spec, progress.state, _mean_step(progress))
    ages = _ages(progress)
    if limit is None or not ages:
        return None
    together = (now - attempt.running_time).total_seconds()
    return Pulse(progress.state, min(*ages, together), limit.seconds, limit.field)


def whereabouts(stacks: Mapping[str, str]) -> str:
    """Where ranks are, by the stacks of their pods: `rank 3: in all_reduce (distributed_c10d.py:2810)`.

    Of a rank that could not write, its pod's sentence; of a pod that sent none, why.
    """
    words: list[str] = []
    for pod, text in sorted(stacks.items()):
        parts = _RANK.split(text)
        if len(parts) == 1:
            words.append(f"pod {pod}: {text.strip().splitlines()[0] if text.strip() else 'no answer'}")
        words += [f"rank {rank}: {_place(body)}" for rank, body in zip(parts[1::2], parts[2::2], strict=True)]
    more = f" and {len(words) - RANKS_TOLD} more" if len(words) > RANKS_TOLD else ""
    return ", ".join(words[:RANKS_TOLD]) + more


def _place(body: str) -> str:
    """The innermost frame of the thread that the signal reached, which is the main one."""
    own = body.rpartition("Current thread ")[2]
    frame = _FRAME.search(own)
    if frame is None:
        return body.strip().splitlines()[0] if body.strip() else "no answer"
    path, line, function = frame.groups()
    return f"in {function} ({path.rpartition('/')[2]}:{line})"


def _ages(progress: Progress) -> list[float]:
    """Seconds since each sign of life. A trainer that does not tell when its phase began is known only by
    its steps, which all phases but two stand still in."""
    ages = [] if progress.state_age_seconds is None else [progress.state_age_seconds]
    if progress.last_step_age_seconds is not None and (ages or progress.state in ("training", "evaluating")):
        ages.append(progress.last_step_age_seconds)
    return ages


def _mean_step(progress: Progress) -> float | None:
    """Mean duration of this attempt's steps."""
    done = progress.step - (progress.resumed_from_step or 0)
    return progress.seconds_in_steps / done if done > 0 else None
