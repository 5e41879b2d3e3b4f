"""Conditions that keep the time of their last transition (as apimachinery's meta.SetStatusCondition)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from yuan2_operator.api.common import Condition, ConditionStatus

MESSAGE_LIMIT = 32768
"""Characters of a message that the CRD takes."""


@dataclass(frozen=True)
class Verdict:
    """A condition before it has a time: what an observation says about one aspect."""

    type: str
    status: ConditionStatus
    reason: str
    message: str


def find_condition(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """The condition of type `kind`, or None."""
    return next((condition for condition in conditions if condition.type == kind), None)


def is_true(conditions: Iterable[Condition], kind: str) -> bool:
    """Whether the condition of type `kind` is there and True."""
    condition = find_condition(conditions, kind)
    return condition is not None and condition.status == "True"


def set_condition(
    conditions: Sequence[Condition], verdict: Verdict, *, now: datetime, generation: int | None
) -> list[Condition]:
    """`conditions` with `verdict` put in its type's place, or added at the end.

    The transition time is `now` if the status differs from before (or there was none), else the earlier one.
    """
    before = find_condition(conditions, verdict.type)
    kept = before is not None and before.status == verdict.status
    after = Condition(
        type=verdict.type,
        status=verdict.status,
        reason=verdict.reason,
        message=verdict.message[:MESSAGE_LIMIT],
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and kept else now,
    )
    if before is None:
        return [*conditions, after]
    return [after if condition.type == verdict.type else condition for condition in conditions]


def set_conditions(
    conditions: Sequence[Condition], verdicts: Iterable[Verdict], *, now: datetime, generation: int | None
) -> list[Condition]:
    """`set_condition` for each verdict in turn."""
    result = list(conditions)
    for verdict in verdicts:
        result = set_condition(result, verdict, now=now, generation=generation)
    return result


def transitions(before: Iterable[Condition], after: Iterable[Condition]) -> list[Condition]:
    """Conditions of `after` whose status or reason is new: what is worth an event."""
    known = {condition.type: (condition.status, condition.reason) for condition in before}
    return [c for c in after if known.get(c.type) != (c.status, c.reason)]
