"""Which changes of a status are worth a Kubernetes event. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from yuan2_operator.api.common import Condition
from yuan2_operator.api.finetune import Attempt
from yuan2_operator.constants import (
    CONDITION_ACCEPTED,
    CONDITION_COMPLETE,
    CONDITION_DEGRADED,
    CONDITION_FAILED,
    CONDITION_READY,
    CONDITION_RUNNING,
    CONDITION_SUSPENDED,
    FIELD_MANAGER,
    Reason,
)
from yuan2_operator.plan.owner import Owner, digest
from yuan2_operator.status.conditions import transitions

NOTE_LIMIT = 1024
"""Characters of a note that the API takes (events.k8s.io/v1)."""

_WORTH = {
    (CONDITION_ACCEPTED, "False"): "Warning",
    (CONDITION_RUNNING, "True"): "Normal",
    (CONDITION_SUSPENDED, "True"): "Normal",
    (CONDITION_COMPLETE, "True"): "Normal",
    (CONDITION_FAILED, "True"): "Warning",
    (CONDITION_READY, "True"): "Normal",
    (CONDITION_DEGRADED, "True"): "Warning",
}
_ORDINARY = frozenset(
    {
        Reason.PENDING,
        Reason.STARTING,
        Reason.RESTARTING,
        Reason.SUSPENDED,
        Reason.FINISHED,
        Reason.CONTAINER_CREATING,
    }
)
"""Reasons of Running=False that need nobody's attention."""


@dataclass(frozen=True)
class Event:
    """Something to tell whoever runs `kubectl describe`."""

    type: Literal["Normal", "Warning"]
    reason: str
    note: str
    action: str = "Reconcile"


def condition_events(before: Iterable[Condition], after: Iterable[Condition]) -> list[Event]:
    """Events for conditions whose status or reason is new and matters."""
    return [
        Event("Warning" if kind == "Warning" else "Normal", condition.reason, condition.message)
        for condition in transitions(before, after)
        if (kind := _kind(condition)) is not None
    ]


def attempt_events(before: Iterable[Attempt], after: Iterable[Attempt]) -> list[Event]:
    """Events for attempts that have ended badly since; the end of the run itself is a condition."""
    known = {attempt.number for attempt in before if attempt.outcome is not None}
    return [
        Event("Warning" if attempt.counted else "Normal", f"Attempt{attempt.outcome}", _note(attempt))
        for attempt in after
        if attempt.number not in known and attempt.outcome in ("Failed", "Disrupted", "Stalled")
    ]


def event_manifest(owner: Owner, event: Event, now: datetime, instance: str) -> dict[str, Any]:
    """The object of events.k8s.io/v1; the same event has the same name, so that it is never told twice."""
    mark = digest(owner.uid, event.reason, event.note, now.strftime("%Y%m%d%H%M"))
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{owner.name}.{mark}", "namespace": owner.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "type": event.type,
        "reason": event.reason,
        "note": event.note[:NOTE_LIMIT],
        "action": event.action,
        "reportingController": FIELD_MANAGER,
        "reportingInstance": instance,
        "regarding": {
            "apiVersion": owner.api_version,
            "kind": owner.kind,
            "name": owner.name,
            "namespace": owner.namespace,
            "uid": owner.uid,
        },
    }


def _kind(condition: Condition) -> str | None:
    if condition.reason in (Reason.UNLIKELY_TO_FIT, Reason.PROGRESS_UNKNOWN):
        return "Warning"
    if condition.type == CONDITION_RUNNING and condition.status == "False":
        return None if condition.reason in _ORDINARY else "Warning"
    return _WORTH.get((condition.type, condition.status))


def _note(attempt: Attempt) -> str:
    counted = "counted against maxRestarts" if attempt.counted else "not counted against maxRestarts"
    return f"attempt {attempt.number} ended, {counted}: {attempt.message}"
