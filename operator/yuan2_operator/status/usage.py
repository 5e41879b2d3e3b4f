"""GPU hours of a run, by attempt and in all. Pure."""

from __future__ import annotations

from datetime import datetime

from yuan2_operator.api.finetune import Attempt, FineTuneSpec, FineTuneStatus
from yuan2_operator.status.attempts import Ledger, World

DIGITS = 2


def with_gpu_hours(
    spec: FineTuneSpec, prior: FineTuneStatus, ledger: Ledger, world: World, now: datetime
) -> tuple[list[Attempt], float | None]:
    """The attempts with their hours, and the sum over all attempts, those no longer remembered included."""
    if spec.workers.gpus_per_worker is None:
        return list(ledger.attempts), None
    before = {attempt.number: attempt for attempt in prior.attempts}
    attempts = [
        _measured(attempt, before.get(attempt.number), spec, world, now) for attempt in ledger.attempts
    ]
    known = sum(before[one.number].gpu_hours or 0.0 for one in attempts if one.number in before)
    total = (prior.gpu_hours or 0.0) - known + sum(one.gpu_hours or 0.0 for one in attempts)
    return attempts, round(max(0.0, total), DIGITS)


def _measured(
    attempt: Attempt, before: Attempt | None, spec: FineTuneSpec, world: World, now: datetime
) -> Attempt:
    """An attempt with its hours so far; those of one that had ended stay."""
    if attempt.running_time is None or (before is not None and before.outcome is not None):
        return attempt
    job = world.view(attempt.number).job
    pods = spec.workers.replicas if job is None or job.pods is None else job.pods
    until = now if attempt.outcome is None or attempt.end_time is None else attempt.end_time
    seconds = max(0.0, (until - attempt.running_time).total_seconds())
    hours = seconds / 3600 * pods * (spec.workers.gpus_per_worker or 0)
    return attempt.model_copy(update={"gpu_hours": round(hours, DIGITS)})
