"""The life of a FineTune as a state machine over its attempts.

An attempt is one Job with all its pods. The ledger says which attempts there were and how each ended;
`advance` reads what the cluster shows and moves the ledger on. It is driven by level: it may be called at
any time, with an older ledger (a status write that was lost), and arrives at the same place. Pure: no
input, no output, `now` is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from yuan2_core.contract import Progress
from yuan2_operator.api.finetune import ATTEMPTS_KEPT, Attempt, AttemptOutcome, FineTuneStatus
from yuan2_operator.api.run_policy import RunPolicy
from yuan2_operator.constants import CONDITION_COMPLETE, CONDITION_FAILED, Reason
from yuan2_operator.status.budget import (
    added,
    blamed,
    budget_is_back,
    fruitless,
    heard,
    progressed,
    restart_delay,
)
from yuan2_operator.status.conditions import find_condition
from yuan2_operator.status.judgement import AttemptView, Judgement, disturbed, judge
from yuan2_operator.status.pods import first_problem
from yuan2_operator.status.stall import Pulse

FINAL: dict[AttemptOutcome | None, bool] = {"Succeeded": True, "Invalid": False, "DeadlineExceeded": False}
"""Outcomes of an attempt that end the run, and whether it is complete then."""
JOBS_KEPT = 2
"""Jobs whose pods are kept for their logs: the newest attempt and the one before it."""


@dataclass(frozen=True)
class Ending:
    """How the whole run ended; it never changes again."""

    complete: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Ledger:
    """What is known about the attempts of one FineTune."""

    attempts: tuple[Attempt, ...] = ()
    """The last ones, oldest first; only the newest may be open, that is without outcome."""
    number: int = 0
    """Number of the newest attempt; 0 before the first."""
    restarts: int = 0
    """Attempts that failed through their own fault and were followed, or will be, by another one."""
    restarts_used: int = 0
    """Those of them that count against maxRestarts now: progress gives them back."""
    disruptions: int = 0
    """Attempts that ended through nobody's fault: preempted, evicted, drained, on a lost node, or deleted."""
    disruption_reasons: Mapping[str, int] = field(default_factory=dict)
    """The same by reason."""
    fruitless: int = 0
    """Disruptions in a row without a newer checkpoint."""
    node_failures: Mapping[str, int] = field(default_factory=dict)
    """Attempts whose failure points to a node, by node."""
    started: datetime | None = None
    """When the first attempt (after a suspension: the next one) was made: activeDeadlineSeconds runs from
    it."""
    ending: Ending | None = None

    @property
    def open(self) -> Attempt | None:
        """The attempt that is under way."""
        newest = self.attempts[-1] if self.attempts else None
        return newest if newest is not None and newest.outcome is None else None

    @property
    def last(self) -> Attempt | None:
        """The newest attempt that has ended."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.outcome is not None), None)

    @property
    def image(self) -> str | None:
        """Trainer image of the newest attempt whose image is known."""
        return next((attempt.image for attempt in reversed(self.attempts) if attempt.image), None)

    def begin(self, number: int, now: datetime) -> Ledger:
        """With attempt `number` under way."""
        attempts = (*self.attempts, Attempt(number=number, start_time=now))[-ATTEMPTS_KEPT:]
        return replace(self, attempts=attempts, number=number, started=self.started or now)

    def note(self, **changes: object) -> Ledger:
        """With fields of the newest attempt changed."""
        return replace(self, attempts=(*self.attempts[:-1], self.attempts[-1].model_copy(update=changes)))


@dataclass(frozen=True)
class World:
    """What the cluster shows of one FineTune."""

    views: Mapping[int, AttemptView] = field(default_factory=dict)
    """Jobs and pods by the number of their attempt."""
    pulse: Pulse | None = None
    """Of the attempt under way, by the word of its rank 0; None when nobody knows."""
    said: Progress | None = None
    """What rank 0 of the attempt under way has just said; None when nobody knows."""
    foreign: bool = False
    """Jobs or pods of an earlier FineTune of the same name are still being removed."""

    def view(self, number: int) -> AttemptView:
        """Job and pods of one attempt, which may be none."""
        return self.views.get(number, AttemptView(number))

    def quiet(self, now: datetime) -> bool:
        """Nothing of any attempt runs, or can begin to run, any more."""
        return not self.foreign and all(view.quiet(now) for view in self.views.values())


def read_ledger(status: FineTuneStatus) -> Ledger:
    """The ledger that a status was written from."""
    ending = None
    for kind in (CONDITION_COMPLETE, CONDITION_FAILED):
        condition = find_condition(status.conditions, kind)
        if condition is not None and condition.status == "True":
            ending = Ending(kind == CONDITION_COMPLETE, condition.reason, condition.message)
    newest = status.attempts[-1] if status.attempts else None
    if ending is None and newest is not None and newest.outcome in FINAL:
        # Somebody took the condition away: the attempt still says how the run ended.
        ending = Ending(FINAL[newest.outcome], newest.reason, newest.message)
    return Ledger(
        attempts=tuple(status.attempts),
        number=status.attempt or 0,
        restarts=status.restarts,
        # A release before wrote only the sum, all of which counted.
        restarts_used=status.restarts if status.restarts_used is None else status.restarts_used,
        disruptions=status.disruptions,
        disruption_reasons=status.disruption_reasons,
        fruitless=status.disruptions_without_progress,
        node_failures=status.node_failures,
        started=status.start_time,
        ending=ending,
    )


def advance(ledger: Ledger, world: World, policy: RunPolicy, *, accepted: bool, now: datetime) -> Ledger:
    """The ledger after what `world` shows; a run that has ended stays as it is.

    A new attempt begins only when `accepted` (everything it refers to is there) and nothing of the earlier
    ones runs any more.
    """
    ledger = _adopt(ledger, world, policy, now)
    if ledger.ending is None and ledger.open is not None:
        ledger = _watch(ledger, world, policy, now)
    if ledger.ending is None and ledger.open is None and _overdue(ledger, policy, now):
        ledger = replace(ledger, ending=_deadline(policy))
    if ledger.ending is not None or ledger.open is not None or policy.suspend or not accepted:
        return ledger
    wait_until = restart_at(ledger)
    if not world.quiet(now) or (wait_until is not None and now < wait_until):
        return ledger
    return _resumed(ledger).begin(ledger.number + 1, now)


def restart_at(ledger: Ledger) -> datetime | None:
    """The earliest moment of the next attempt, or None: at once. Attempts in a row that came to nothing make
    it later."""
    delay, last = restart_delay(ledger.attempts), ledger.last
    return None if not delay or last is None or last.end_time is None else last.end_time + delay


def unwanted(ledger: Ledger, world: World) -> list[int]:
    """Attempts whose Jobs must go: ended for us but not for Kubernetes, or too old to keep for their logs.

    An invalid one ends by itself, through the Job's podFailurePolicy, and its logs are worth keeping.
    """
    opened = ledger.open.number if ledger.open is not None else None
    invalid = {attempt.number for attempt in ledger.attempts if attempt.outcome == "Invalid"}
    gone: list[int] = []
    for number, view in sorted(world.views.items()):
        if view.job is None or view.job.deleting or number == opened:
            continue
        if not (view.job.finishing or number in invalid) or number <= ledger.number - JOBS_KEPT:
            gone.append(number)
    return gone


def _adopt(ledger: Ledger, world: World, policy: RunPolicy, now: datetime) -> Ledger:
    """Take in Jobs that a lost status write did not mention."""
    for number in sorted(number for number, view in world.views.items() if view.job is not None):
        job = world.views[number].job
        if number <= ledger.number or job is None:
            continue
        if ledger.open is not None:
            # The successor exists, so this one had ended when it was made.
            view = world.view(ledger.number)
            fallback = Judgement("Disrupted", Reason.DISRUPTED, "its end was not seen")
            ledger = _close(
                ledger, judge(view, ledger.attempts[-1], now, certain=True) or fallback, policy, now
            )
        lost = max(0, job.restarts - ledger.restarts)
        used = min(ledger.restarts_used + lost, policy.max_restarts)
        ledger = replace(
            ledger, restarts=ledger.restarts + lost, restarts_used=used if lost else ledger.restarts_used
        )
        if ledger.ending is None:
            ledger = _resumed(ledger).begin(number, job.created or now)
    return ledger


def _watch(ledger: Ledger, world: World, policy: RunPolicy, now: datetime) -> Ledger:
    """Look whether the open attempt has ended, or must end."""
    attempt = ledger.attempts[-1]
    view = world.view(attempt.number)
    said = world.said or view.progress()
    if said is not None:
        ledger = ledger.note(**heard(attempt, said))
    verdict = judge(view, attempt, now)
    if verdict is None and not view.failing:
        verdict = _intervene(ledger, world, policy, now)
    if verdict is not None:
        return _close(ledger, verdict, policy, now)
    ledger = _noted(ledger, view, now)
    cause = disturbed(view)
    if cause is None or attempt.reason:
        return ledger
    return ledger.note(reason=cause.reason, message=cause.message, end_time=cause.at)


def _noted(ledger: Ledger, view: AttemptView, now: datetime) -> Ledger:
    """With what is first seen of an attempt that goes on."""
    attempt = ledger.attempts[-1]
    if attempt.running_time is None and view.together:
        ledger = ledger.note(running_time=now)
    image = next((pod.image for pod in view.pods if pod.image is not None), None)
    return ledger.note(image=image) if attempt.image is None and image is not None else ledger


def _intervene(ledger: Ledger, world: World, policy: RunPolicy, now: datetime) -> Judgement | None:
    """Reasons of our own to end an attempt that runs."""
    if _overdue(ledger, policy, now):
        return Judgement("DeadlineExceeded", Reason.DEADLINE_EXCEEDED, _deadline(policy).message)
    if policy.suspend:
        return Judgement("Suspended", Reason.SUSPENDED, "spec.runPolicy.suspend was set")
    alone = _waits_alone(world.view(ledger.number), ledger.attempts[-1], policy, now)
    if alone is not None:
        return alone
    if world.pulse is not None and world.pulse.hangs:
        return Judgement("Stalled", Reason.STALLED, world.pulse.sentence, counted=True)
    return None


def _waits_alone(view: AttemptView, attempt: Attempt, policy: RunPolicy, now: datetime) -> Judgement | None:
    """Some pods run and hold nodes, the others do not come."""
    since = view.waiting_since()
    limit = policy.start_timeout_seconds
    if attempt.running_time is not None or since is None or now < since + timedelta(seconds=limit):
        return None
    problem = first_problem(view.pods)
    starting = next((pod.waiting for pod in view.pods if pod.waiting is not None), "a pod is missing")
    text = (
        f"{sum(pod.alive for pod in view.pods)} of {len(view.pods)} pods waited {limit} s "
        f"(spec.runPolicy.startTimeoutSeconds) for the others and give their nodes back: "
        f"{starting if problem is None else problem.message}"
    )
    return Judgement("Disrupted", Reason.PODS_NOT_TOGETHER, text)


def _close(ledger: Ledger, verdict: Judgement, policy: RunPolicy, now: datetime) -> Ledger:
    ledger = ledger.note(
        outcome=verdict.outcome,
        reason=verdict.reason,
        message=verdict.message,
        counted=verdict.counted,
        node=verdict.node,
        end_time=now,
    )
    if budget_is_back(ledger.attempts, policy, now):
        ledger = replace(ledger, restarts_used=0)
    if progressed(ledger.attempts):
        ledger = replace(ledger, fruitless=0)
    if verdict.node is not None:
        ledger = replace(ledger, node_failures=blamed(ledger.node_failures, verdict.node))
    return replace(ledger, **_consequence(ledger, verdict, policy))


def _consequence(ledger: Ledger, verdict: Judgement, policy: RunPolicy) -> dict[str, Any]:
    """What an ended attempt means for the run: its end, one restart more, or nothing."""
    if verdict.outcome in FINAL:
        return {"ending": Ending(FINAL[verdict.outcome], verdict.reason, verdict.message)}
    if verdict.outcome == "Disrupted":
        return _disrupted(ledger, verdict, policy)
    if not verdict.counted:
        return {}
    if ledger.restarts_used >= policy.max_restarts:
        text = f"attempt {ledger.number} failed and {_used(policy)}: {verdict.message}"
        return {"ending": Ending(False, Reason.TOO_MANY_RESTARTS, text)}
    return {"restarts": ledger.restarts + 1, "restarts_used": ledger.restarts_used + 1}


def _disrupted(ledger: Ledger, verdict: Judgement, policy: RunPolicy) -> dict[str, Any]:
    """A disruption is never a failure, but a run that gets nowhere between them must not go on for ever."""
    idle = ledger.fruitless + fruitless(ledger.attempts)
    changes: dict[str, Any] = {
        "disruptions": ledger.disruptions + 1,
        "disruption_reasons": added(ledger.disruption_reasons, verdict.reason),
        "fruitless": idle,
    }
    limit = policy.max_disruptions_without_progress
    if idle > limit:
        text = (
            f"attempt {ledger.number} was disrupted, as were {limit} before it "
            f"(spec.runPolicy.maxDisruptionsWithoutProgress), and none left a newer checkpoint: write "
            f"checkpoints more often (spec.checkpoint.everySeconds), or find out what ends the pods; last: "
            f"{verdict.message}"
        )
        changes["ending"] = Ending(False, Reason.NO_PROGRESS, text)
    return changes


def _used(policy: RunPolicy) -> str:
    if policy.max_restarts == 0:
        return "spec.runPolicy.maxRestarts allows no restart"
    return f"all {policy.max_restarts} restarts of spec.runPolicy.maxRestarts are used without progress"


def _resumed(ledger: Ledger) -> Ledger:
    """After a suspension the deadline's clock starts again, as that of a batch/v1 Job does."""
    last = ledger.last
    return replace(ledger, started=None) if last is not None and last.outcome == "Suspended" else ledger


def deadline_at(ledger: Ledger, policy: RunPolicy) -> datetime | None:
    """When the run will have taken too long; None without a limit, before its start and while suspended."""
    limit, last = policy.active_deadline_seconds, ledger.last
    rests = ledger.open is None and (policy.suspend or (last is not None and last.outcome == "Suspended"))
    if limit is None or ledger.started is None or rests:
        return None
    return ledger.started + timedelta(seconds=limit)


def _overdue(ledger: Ledger, policy: RunPolicy, now: datetime) -> bool:
    deadline = deadline_at(ledger, policy)
    return deadline is not None and now >= deadline


def _deadline(policy: RunPolicy) -> Ending:
    text = (
        f"the run took longer than spec.runPolicy.activeDeadlineSeconds ({policy.active_deadline_seconds} s)"
    )
    return Ending(False, Reason.DEADLINE_EXCEEDED, text)
