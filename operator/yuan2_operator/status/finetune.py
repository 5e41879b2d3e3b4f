"""The status of a Yuan2FineTune: conditions, phase and fields from its ledger, pods and progress. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from yuan2_core.conflicts import adapter_of, method_name
from yuan2_core.contract import Progress
from yuan2_operator.api.common import ConditionStatus, ModelPlace, ModelReference
from yuan2_operator.api.finetune import FineTunePhase, FineTuneSpec, FineTuneStatus, RunEstimate
from yuan2_operator.constants import (
    ADAPTER_DIRECTORY,
    CHECKPOINT_DIRECTORY,
    CONDITION_COMPLETE,
    CONDITION_FAILED,
    CONDITION_FINISHED,
    CONDITION_RECONCILING,
    CONDITION_RUNNING,
    CONDITION_STALLED,
    CONDITION_SUSPENDED,
    EXPORT_DIRECTORY,
    Reason,
)
from yuan2_operator.status.attempts import Ending, Ledger, World, read_ledger, restart_at
from yuan2_operator.status.conditions import Verdict, set_conditions
from yuan2_operator.status.judgement import AttemptView
from yuan2_operator.status.pods import Problem, first_problem
from yuan2_operator.status.progress import progress_fields
from yuan2_operator.status.usage import with_gpu_hours

PODS_EXPECTED_SECONDS = 20.0
"""Seconds after which a Job without pods is worth a hint."""


@dataclass(frozen=True)
class Finding:
    """Everything that the status of a FineTune is made of, beside its spec and its prior status."""

    uid: str
    generation: int
    ledger: Ledger
    world: World
    acceptance: Verdict
    """The condition Accepted."""
    estimate: RunEstimate | None = None
    """What the run will need."""
    progress: Progress | None = None
    """What rank 0 said just now."""
    silence: str | None = None
    """Why rank 0 has not said anything for some time: a clause."""
    room: str | None = None
    """How many nodes could take a pod that fits none."""
    trouble: Problem | None = None
    """Why the cluster refused an object that is needed."""


def compose(spec: FineTuneSpec, prior: FineTuneStatus, finding: Finding, now: datetime) -> FineTuneStatus:
    """The status to write; equal to `prior` when nothing happened."""
    ledger = finding.ledger
    fields = _progress(prior, finding, now)
    fields["resumed_from_step"] = fields.get("resumed_from_step", prior.resumed_from_step)
    ended = read_ledger(prior).ending
    ending = ended or _explained(ledger.ending, fields)
    attempts, gpu_hours = with_gpu_hours(spec, prior, ledger, finding.world, now)
    if fields.get("last_checkpoint_step"):
        place = f"{CHECKPOINT_DIRECTORY}/step-{fields['last_checkpoint_step']:06d}"
        fields["last_checkpoint_path"] = _directory(spec, place).path
    status = prior.model_copy(
        update={
            **fields,
            "observed_generation": finding.generation,
            "method": method_name(spec.method),
            "estimate": prior.estimate if ended is not None else finding.estimate,
            "attempt": ledger.number or None,
            "restarts": ledger.restarts,
            "restarts_used": ledger.restarts_used,
            "disruptions": ledger.disruptions,
            "disruption_reasons": dict(ledger.disruption_reasons),
            "disruptions_without_progress": ledger.fruitless,
            "node_failures": dict(ledger.node_failures),
            "nodes": _nodes(finding) or prior.nodes,
            "gpu_hours": gpu_hours,
            "attempts": attempts,
            "start_time": ledger.started or prior.start_time,
            "completion_time": prior.completion_time or (now if ending is not None else None),
        }
    )
    if ended is None:
        status = _with_conditions(spec, status, finding, ending, now)
    else:
        # They hold for any later spec as well: a run that has ended stays as it is.
        seen = {"observed_generation": finding.generation}
        kept = [condition.model_copy(update=seen) for condition in status.conditions]
        status = status.model_copy(update={"conditions": kept})
    return FineTuneStatus.model_validate(status.model_dump())


def _with_conditions(
    spec: FineTuneSpec, status: FineTuneStatus, finding: Finding, ending: Ending | None, now: datetime
) -> FineTuneStatus:
    verdicts = [
        finding.acceptance,
        _running(spec, finding, now),
        _suspended(spec, status, finding, now),
        *_endings(spec, ending),
        _reconciling(spec, finding, ending),
    ]
    conditions = set_conditions(status.conditions, verdicts, now=now, generation=finding.generation)
    update: dict[str, Any] = {"conditions": conditions, "phase": _phase(verdicts)}
    if update["phase"] != "Running" or finding.silence is not None:
        update["eta"] = None
    if ending is not None:
        update["model"] = model_of(spec, finding.uid, finding.ledger.number) if ending.complete else None
    return status.model_copy(update=update)


def model_of(spec: FineTuneSpec, uid: str, attempt: int) -> ModelReference:
    """What a complete run lets be served; the fingerprint names the run that wrote it.

    An adapter that was not merged needs the model that it was trained on.
    """
    fingerprint = f"{uid}-{attempt}"
    if adapter_of(spec.method) is None or spec.output.merge_adapter:
        made = _directory(spec, EXPORT_DIRECTORY)
        return ModelReference(claim_name=made.claim_name, path=made.path, fingerprint=fingerprint)
    base = spec.model.source.persistent_volume_claim
    adapter = _directory(spec, ADAPTER_DIRECTORY)
    return ModelReference(
        claim_name=base.claim_name, path=base.path, adapter=adapter, fingerprint=fingerprint
    )


def _directory(spec: FineTuneSpec, name: str) -> ModelPlace:
    """A directory of the output."""
    claim = spec.output.persistent_volume_claim
    return ModelPlace(claim_name=claim.claim_name, path=name if claim.path == "." else f"{claim.path}/{name}")


def _left_behind(spec: FineTuneSpec) -> str:
    """Where a complete run's result is, in words."""
    trains_adapter = adapter_of(spec.method) is not None
    made = {"adapter": ADAPTER_DIRECTORY} if trains_adapter else {}
    if not trains_adapter or spec.output.merge_adapter:
        made = {"model": EXPORT_DIRECTORY, **made}
    claim = spec.output.persistent_volume_claim.claim_name
    places = [
        f"the {what} is in claim {claim}, directory {_directory(spec, made[what]).path}" for what in made
    ]
    return "; ".join(places)


def _progress(prior: FineTuneStatus, finding: Finding, now: datetime) -> dict[str, Any]:
    """Progress fields: what rank 0 says now, else what it left when it ended, else as they were."""
    progress = finding.progress
    if progress is None and finding.ledger.number:
        progress = finding.world.view(finding.ledger.number).progress()
    if progress is None or (progress.step == 0 and not progress.total_steps and prior.step):
        # A trainer that has just started does not know yet how far the run is.
        return {}
    return progress_fields(progress, prior, now)


def _explained(ending: Ending | None, fields: dict[str, Any]) -> Ending | None:
    """A failure with the step of the last checkpoint and the way on."""
    if ending is None or ending.complete:
        return ending
    step = fields.get("last_checkpoint_step")
    kept = f"; the checkpoint of step {step} is complete" if step is not None else ""
    way_out = "; once the cause is gone, delete this Yuan2FineTune and create it again"
    more = " with the same output to go on from it" if step is not None else ""
    return Ending(False, ending.reason, ending.message + kept + way_out + more)


def _running(spec: FineTuneSpec, finding: Finding, now: datetime) -> Verdict:
    ledger, world = finding.ledger, finding.world
    if ledger.ending is not None:
        text = "the run is complete" if ledger.ending.complete else "the run has failed"
        return Verdict(CONDITION_RUNNING, "False", Reason.FINISHED, text)
    if finding.trouble is not None:
        return Verdict(CONDITION_RUNNING, "False", finding.trouble.reason, finding.trouble.message)
    if ledger.open is not None:
        view = world.view(ledger.open.number)
        # The spec may say another number already, for the attempt after a suspension.
        wanted = spec.workers.replicas if view.job is None else view.job.pods or spec.workers.replicas
        return _attempt_running(view, wanted, finding, now)
    if spec.run_policy.suspend:
        return Verdict(CONDITION_RUNNING, "False", Reason.SUSPENDED, "spec.runPolicy.suspend is true")
    if ledger.last is not None:
        return Verdict(CONDITION_RUNNING, "False", Reason.RESTARTING, _restarting(ledger))
    return Verdict(CONDITION_RUNNING, "False", Reason.PENDING, "no pods yet: " + finding.acceptance.message)


def _attempt_running(view: AttemptView, wanted: int, finding: Finding, now: datetime) -> Verdict:
    alive = sum(pod.alive for pod in view.pods)
    count = f"{alive} of {wanted} pods run"
    if view.failing:
        text = f"attempt {view.number} has failed and its pods are ending"
        problem = first_problem(view.pods)
        return Verdict(
            CONDITION_RUNNING, "False", Reason.RESTARTING, f"{text}: {problem.message}" if problem else text
        )
    if alive >= wanted:
        return _together(view, count, finding)
    problem = first_problem(view.pods)
    if problem is not None:
        more = f"; {finding.room}" if finding.room and problem.reason == Reason.UNSCHEDULABLE else ""
        return Verdict(CONDITION_RUNNING, "False", problem.reason, f"{problem.message}{more} ({count})")
    return Verdict(CONDITION_RUNNING, "False", Reason.STARTING, _starting(view, count, finding, now))


def _together(view: AttemptView, count: str, finding: Finding) -> Verdict:
    """All pods run, whatever is known of what they do."""
    text = f"attempt {view.number}: {count}"
    if finding.silence is None:
        return Verdict(CONDITION_RUNNING, "True", Reason.TRAINING, text)
    unknown = f"{text}; their progress is unknown, which ends nothing: {finding.silence}"
    return Verdict(CONDITION_RUNNING, "True", Reason.PROGRESS_UNKNOWN, unknown)


def _starting(view: AttemptView, count: str, finding: Finding, now: datetime) -> str:
    waiting = next((pod.waiting for pod in view.pods if pod.waiting is not None), None)
    if waiting is not None:
        return f"{waiting} ({count})"
    attempt = finding.ledger.open
    begun = attempt.start_time if attempt is not None else None
    if (
        view.job is None
        or view.pods
        or begun is None
        or (now - begun).total_seconds() < PODS_EXPECTED_SECONDS
    ):
        return f"attempt {view.number} is starting ({count})"
    hint = "a quota or an admission policy may refuse them"
    return f"Job {view.job.name} has no pods yet: `kubectl describe job {view.job.name}` says why; {hint}"


def _restarting(ledger: Ledger) -> str:
    last = ledger.last
    assert last is not None
    when = restart_at(ledger)
    after = f" not before {when:%H:%M:%S} UTC" if when is not None else " when its pods have ended"
    return f"attempt {last.number} ended ({last.outcome}): {last.message}; the next one begins{after}"


def _suspended(spec: FineTuneSpec, status: FineTuneStatus, finding: Finding, now: datetime) -> Verdict:
    if finding.ledger.ending is not None or not spec.run_policy.suspend:
        return Verdict(CONDITION_SUSPENDED, "False", Reason.NOT_SUSPENDED, "spec.runPolicy.suspend is false")
    if not finding.world.quiet(now):
        text = "the pods were asked to write a checkpoint and end"
        return Verdict(CONDITION_SUSPENDED, "False", Reason.SUSPENDING, text)
    step = status.last_checkpoint_step
    begin = f"from the checkpoint of step {step}" if step is not None else "from the beginning"
    text = f"no pod runs; set spec.runPolicy.suspend to false to go on {begin}"
    return Verdict(CONDITION_SUSPENDED, "True", Reason.SUSPENDED, text)


def _endings(spec: FineTuneSpec, ending: Ending | None) -> Iterator[Verdict]:
    if ending is None:
        for kind in (CONDITION_COMPLETE, CONDITION_FAILED, CONDITION_FINISHED, CONDITION_STALLED):
            yield Verdict(kind, "False", Reason.NOT_FINISHED, "the run has not ended")
        return
    reached, other = (
        (CONDITION_COMPLETE, CONDITION_FAILED) if ending.complete else (CONDITION_FAILED, CONDITION_COMPLETE)
    )
    text = _left_behind(spec) if ending.complete else ending.message
    yield Verdict(reached, "True", ending.reason, text)
    yield Verdict(other, "False", Reason.FINISHED, "the run has ended otherwise")
    yield Verdict(CONDITION_FINISHED, "True", ending.reason, f"the run is {_phase_of(ending)}")
    stalled: ConditionStatus = "False" if ending.complete else "True"
    yield Verdict(CONDITION_STALLED, stalled, ending.reason, f"the run is {_phase_of(ending)}")


def _reconciling(spec: FineTuneSpec, finding: Finding, ending: Ending | None) -> Verdict:
    """kstatus' word for what has not begun yet: as of a Job, only the start is waited for."""
    if ending is not None:
        return Verdict(CONDITION_RECONCILING, "False", Reason.FINISHED, "the run has ended")
    if spec.run_policy.suspend:
        return Verdict(CONDITION_RECONCILING, "False", Reason.SUSPENDED, "spec.runPolicy.suspend is true")
    if finding.trouble is not None:
        return Verdict(CONDITION_RECONCILING, "True", finding.trouble.reason, finding.trouble.message)
    if finding.acceptance.status == "False":
        return Verdict(CONDITION_RECONCILING, "True", finding.acceptance.reason, finding.acceptance.message)
    if finding.ledger.number == 0:
        return Verdict(CONDITION_RECONCILING, "True", Reason.PENDING, "no attempt has started")
    return Verdict(CONDITION_RECONCILING, "False", Reason.STARTED, "the run has started")


def _nodes(finding: Finding) -> list[str]:
    """Nodes of the open attempt by rank, once all of its pods run."""
    ledger = finding.ledger
    if ledger.open is None or ledger.open.running_time is None:
        return []
    return [pod.node for pod in finding.world.view(ledger.number).pods if pod.node is not None]


def _phase_of(ending: Ending) -> str:
    return "complete" if ending.complete else "failed"


def _phase(verdicts: list[Verdict]) -> FineTunePhase:
    holds = {verdict.type for verdict in verdicts if verdict.status == "True"}
    phases: tuple[tuple[str, FineTunePhase], ...] = (
        (CONDITION_FAILED, "Failed"),
        (CONDITION_COMPLETE, "Complete"),
        (CONDITION_SUSPENDED, "Suspended"),
        (CONDITION_RUNNING, "Running"),
    )
    return next((phase for kind, phase in phases if kind in holds), "Pending")
