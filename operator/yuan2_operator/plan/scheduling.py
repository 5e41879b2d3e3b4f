"""Which queue holds a run, and when it gives its place back. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from yuan2_operator.api.common import Condition
from yuan2_operator.api.finetune import Scheduling
from yuan2_operator.constants import CONDITION_FAILED, CONDITION_SUSPENDED
from yuan2_operator.plan.owner import Owner, digest


def in_kueue(scheduling: Scheduling) -> bool:
    """Whether `queueName` is a LocalQueue of Kueue."""
    return scheduling.queue_name is not None and scheduling.gang != "volcano"


def workload_name(owner: Owner) -> str:
    """Name of the run's pod group and so of its Workload: never that of an earlier run of the same name."""
    return f"{owner.name}-{digest(owner.uid)[:5]}"


def gives_place_back(before: Iterable[Condition], after: Iterable[Condition]) -> bool:
    """Whether a run has just been suspended or has failed. Until then its Workload holds the quota between
    two attempts; that of a complete run ends by itself."""
    return bool(_resting(after) - _resting(before))


def _resting(conditions: Iterable[Condition]) -> set[str]:
    kinds = (CONDITION_FAILED, CONDITION_SUSPENDED)
    return {entry.type for entry in conditions if entry.type in kinds and entry.status == "True"}
