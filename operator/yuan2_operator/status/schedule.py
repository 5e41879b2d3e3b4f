"""When a FineTune must be looked at again although nothing was heard of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.api.run_policy import RunPolicy
from yuan2_operator.status.attempts import Ledger, World, deadline_at, restart_at
from yuan2_operator.status.finetune import PODS_EXPECTED_SECONDS
from yuan2_operator.status.progress import WRITE_SECONDS

SETTLING_SECONDS = 10.0
"""Pods that are ending are looked at this often: one on a dead node never reports its end."""
TROUBLE_SECONDS = 15.0


@dataclass(frozen=True)
class Rhythm:
    """The settings' intervals, in seconds."""

    poll: float
    missing: float


@dataclass(frozen=True)
class Outlook:
    """What a pass has found, as far as the next one depends on it."""

    ledger: Ledger
    world: World
    accepted: bool
    trouble: bool


def next_look(
    policy: RunPolicy, status: FineTuneStatus, outlook: Outlook, rhythm: Rhythm, now: datetime
) -> float | None:
    """Seconds until the next look, or None: only when something happens."""
    if outlook.ledger.ending is not None:
        removal = removal_time(policy, status)
        return None if removal is None or removal <= now else (removal - now).total_seconds()
    return min(_reasons(policy, outlook, rhythm, now), default=None)


def removal_time(policy: RunPolicy, status: FineTuneStatus) -> datetime | None:
    """When the pods of a run that has ended are to go, or None: never."""
    if policy.ttl_seconds_after_finished is None or status.completion_time is None:
        return None
    return status.completion_time + timedelta(seconds=policy.ttl_seconds_after_finished)


def _reasons(policy: RunPolicy, outlook: Outlook, rhythm: Rhythm, now: datetime) -> Iterator[float]:
    ledger, world = outlook.ledger, outlook.world
    if outlook.trouble:
        yield TROUBLE_SECONDS
    if not outlook.accepted:
        yield rhythm.missing
    if ledger.open is not None:
        yield WRITE_SECONDS if world.pulse is None else max(rhythm.poll, world.pulse.left)
    deadline = deadline_at(ledger, policy)
    if deadline is not None:
        yield _until(deadline, now)
    if ledger.open is not None and not world.view(ledger.number).pods:
        yield PODS_EXPECTED_SECONDS
    since = world.view(ledger.number).waiting_since() if ledger.open is not None else None
    if since is not None:
        yield _until(since + timedelta(seconds=policy.start_timeout_seconds), now)
    if any(
        pod.delete_by is not None and not pod.terminal for view in world.views.values() for pod in view.pods
    ):
        yield SETTLING_SECONDS
    again = restart_at(ledger)
    if ledger.open is not None or policy.suspend:
        return
    if not world.quiet(now):
        yield SETTLING_SECONDS
    elif again is not None and now < again:
        yield _until(again, now)


def _until(moment: datetime, now: datetime) -> float:
    # At least a second: times are whole seconds, and a moment that has just passed must not spin.
    return max(1.0, (moment - now).total_seconds())
