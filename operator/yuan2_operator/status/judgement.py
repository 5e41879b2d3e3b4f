"""Whether an attempt has ended, how, and through whose fault.

The facts of one attempt are its Job and its pods. A failure is counted against maxRestarts; a disruption
(preemption, drain, node loss, somebody deletes a pod or the Job) is not; exit code 78 ends the run at once,
since another attempt would meet the same error. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from yuan2_core.contract import EXIT_INVALID, EXIT_PREEMPTED, PEER_LOST, PEERS_MISSING, Progress, Termination
from yuan2_operator.api.finetune import Attempt, AttemptOutcome
from yuan2_operator.constants import ANNOTATION_CONFIG, ANNOTATION_RESTARTS, LABEL_ATTEMPT, Reason
from yuan2_operator.status.pods import PodFacts, Problem, condition, parse_time, shorten

EXIT_KILLED = 137
"""Of a container that SIGKILL ended."""
ONE_SECOND = timedelta(seconds=1)
"""Resolution of the API's times."""


@dataclass(frozen=True)
class JobFacts:
    """The part of a batch/v1 Job that decisions are made of."""

    name: str
    attempt: int
    created: datetime | None = None
    pods: int | None = None
    """How many it makes, one a node."""
    deleting: bool = False
    complete: bool = False
    failing: bool = False
    """It has failed, or will as soon as its pods have ended (condition FailureTarget)."""
    failure: str = ""
    """Message of that condition."""
    config: str | None = None
    """Name of the ConfigMap with its job file; None in Jobs of releases that did not tell it."""
    restarts: int = 0
    """Counted restarts when it was made, from its annotation."""

    @property
    def finishing(self) -> bool:
        """It makes no more pods, and ends those that it has."""
        return self.complete or self.failing


@dataclass(frozen=True)
class AttemptView:
    """Job and pods of one attempt as the cluster shows them."""

    number: int
    job: JobFacts | None = None
    pods: tuple[PodFacts, ...] = ()
    """By completion index."""

    @property
    def failing(self) -> bool:
        """Its Job has failed, though pods may still be ending."""
        return self.job is not None and self.job.failing

    @property
    def together(self) -> bool:
        """All of its pods run."""
        alive = sum(pod.alive for pod in self.pods)
        return self.job is not None and self.job.pods is not None and alive >= self.job.pods

    def waiting_since(self) -> datetime | None:
        """Since when pods that run have waited for others that do not; None where none wait."""
        running = [pod.started for pod in self.pods if pod.running and pod.started is not None]
        return None if self.together or not running else min(running)

    def quiet(self, now: datetime) -> bool:
        """No pod runs, and none will be made."""
        makes_none = self.job is None or self.job.finishing or self.job.deleting
        return makes_none and all(pod.settled(now) for pod in self.pods)

    @property
    def termination(self) -> Termination | None:
        """What rank 0 left, if it has ended."""
        return next((pod.termination for pod in self.pods if pod.index == 0 and pod.termination), None)

    def progress(self) -> Progress | None:
        """What rank 0 last said of its progress, if it has ended."""
        return None if self.termination is None else self.termination.progress


@dataclass(frozen=True)
class Judgement:
    """How an attempt ended."""

    outcome: AttemptOutcome
    reason: str
    message: str
    counted: bool = False
    node: str | None = None
    """The node that it points to."""


@dataclass(frozen=True)
class Disturbance:
    """Somebody deleted a pod of an attempt that was well."""

    reason: str
    message: str
    at: datetime


def read_job(job: Mapping[str, Any]) -> JobFacts:
    """Facts of one Job as the API server sent it."""
    metadata, status = job["metadata"], job.get("status", {})
    failure = next(
        (
            entry
            for kind in ("FailureTarget", "Failed")
            if (entry := condition(status, kind)).get("status") == "True"
        ),
        None,
    )
    return JobFacts(
        name=metadata["name"],
        attempt=int(metadata.get("labels", {}).get(LABEL_ATTEMPT, 0)),
        created=parse_time(metadata.get("creationTimestamp")),
        pods=job.get("spec", {}).get("parallelism"),
        deleting="deletionTimestamp" in metadata,
        complete=condition(status, "Complete").get("status") == "True",
        failing=failure is not None,
        failure=str(failure.get("message", "")) if failure is not None else "",
        config=metadata.get("annotations", {}).get(ANNOTATION_CONFIG),
        restarts=int(metadata.get("annotations", {}).get(ANNOTATION_RESTARTS, 0)),
    )


def judge(view: AttemptView, attempt: Attempt, now: datetime, *, certain: bool = False) -> Judgement | None:
    """The verdict on an open attempt, or None while it may still succeed or its pods are still ending.

    With `certain` (a later attempt exists) pods that have not ended are not waited for.
    """
    job = view.job
    if job is None:
        text = f"Job {attempt.number} of the run was deleted by somebody else"
        return Judgement("Disrupted", Reason.DISRUPTED, text) if certain or view.quiet(now) else None
    if job.complete:
        ended = view.termination
        text = f"attempt {attempt.number} trained to the end" if ended is None else shorten(ended.message)
        return Judgement("Succeeded", Reason.SUCCEEDED, text)
    invalid = _invalid(view, job)
    if invalid is not None:
        return invalid
    if not (certain or (view.quiet(now) and (job.failing or job.deleting))):
        return None
    return _disrupted(view, job, attempt, now) or _not_together(view, attempt) or _failed(view, job)


def disturbed(view: AttemptView) -> Disturbance | None:
    """A pod that is being deleted although its attempt was well: whoever did it, the attempt did not fail.

    Noted as soon as it is seen, because such a pod leaves nothing behind to judge by.
    """
    if view.job is None or view.job.finishing or view.job.deleting:
        return None
    for pod in view.pods:
        at = pod.deletion_requested
        # Whole seconds: a crash in the same second may be what made the Job controller delete this pod.
        if at is not None and not any(_crashed_before(other, at + ONE_SECOND) for other in view.pods):
            deleted = Problem(Reason.DISRUPTED, f"pod {pod.name} was deleted by somebody else")
            cause = pod.problem if pod.disruption is not None and pod.problem is not None else deleted
            return Disturbance(cause.reason, cause.message, at)
    return None


def crashed(pod: PodFacts) -> bool:
    """It ended by its own fault."""
    if not _in_error(pod):
        return False
    asked, ended = pod.deletion_requested, pod.finished
    return asked is None or (ended is not None and ended < asked)


def _in_error(pod: PodFacts) -> bool:
    """It ended neither well nor as preempted, and nobody evicted it."""
    return pod.phase == "Failed" and pod.disruption is None and pod.exit_code not in (0, EXIT_PREEMPTED)


def _crashed_before(pod: PodFacts, moment: datetime) -> bool:
    return crashed(pod) and (pod.finished is None or pod.finished < moment)


def _fell(pod: PodFacts) -> bool:
    """It failed by itself although the Job, whose other pod had ended before, was about to end it.

    It says so, or it was killed before the kubelet would have done that, at the end of its grace period.
    """
    if not _in_error(pod):
        return False
    if pod.termination is not None:
        return not _lost_peer(pod)
    early = pod.finished is not None and pod.delete_by is not None and pod.finished < pod.delete_by
    return pod.exit_code == EXIT_KILLED and early


def _lost_peer(pod: PodFacts) -> bool:
    return pod.termination is not None and pod.termination.reason == PEER_LOST


def _suspicion(pod: PodFacts) -> tuple[bool, bool, float, int]:
    """Sorts pods that failed: the cause first."""
    ended = pod.finished.timestamp() if pod.finished is not None else 0.0
    return _lost_peer(pod), pod.finished is None, ended, pod.index


def _invalid(view: AttemptView, job: JobFacts) -> Judgement | None:
    for pod in view.pods:
        if pod.exit_code == EXIT_INVALID and pod.problem is not None:
            return Judgement("Invalid", pod.problem.reason, pod.problem.message)
    if job.failing and f"exit code {EXIT_INVALID} " in job.failure:
        return Judgement("Invalid", Reason.INVALID_SPEC, shorten(job.failure))
    return None


def _disrupted(view: AttemptView, job: JobFacts, attempt: Attempt, now: datetime) -> Judgement | None:
    cause = next(_disruptions(view, job, attempt, now), None)
    if cause is None:
        return None
    lost = cause.reason == Reason.NODE_LOST
    node = next((pod.node for pod in view.pods if pod.disruption is not None or pod.lost(now)), None)
    return Judgement("Disrupted", cause.reason, cause.message, node=node if lost else None)


def _disruptions(view: AttemptView, job: JobFacts, attempt: Attempt, now: datetime) -> Iterator[Problem]:
    """What disrupted the attempt, the surest first; a dead node outweighs the crashes that it causes on the
    others."""
    for pod in view.pods:
        if pod.disruption is not None:
            yield pod.problem or Problem(Reason.EVICTED, f"pod {pod.name} was disrupted")
        if pod.lost(now):
            text = f"pod {pod.name} did not end in time: its node {pod.node} is dead or cut off"
            yield Problem(Reason.NODE_LOST, text)
    if job.deleting and not job.failing:
        yield Problem(Reason.DISRUPTED, f"Job {job.name} was deleted by somebody else")
    if "DisruptionTarget" in job.failure:
        yield Problem(Reason.DISRUPTED, _translated(job.failure))
    at = attempt.end_time if attempt.reason else None
    if at is not None and not any(_crashed_before(pod, at) for pod in view.pods):
        yield Problem(attempt.reason, attempt.message)
    if f"exit code {EXIT_PREEMPTED} " in job.failure:
        yield Problem(Reason.TERMINATED, _translated(job.failure))
    if at is None and not any(crashed(pod) for pod in view.pods):
        text = f"pods of Job {job.name} ended or were deleted without an error: {shorten(job.failure)}"
        yield Problem(Reason.DISRUPTED, text)


def _translated(failure: str) -> str:
    """The Job controller's message (`Pod ns/name has condition DisruptionTarget matching …`), for people."""
    name = next((word.split("/")[1] for word in failure.split() if word.count("/") == 1), "?")
    if f"exit code {EXIT_PREEMPTED} " in failure:
        return f"pod {name} was asked to stop (SIGTERM); its last checkpoint stays"
    return f"pod {name} was preempted, was evicted or lost its node"


def _not_together(view: AttemptView, attempt: Attempt) -> Judgement | None:
    """Pods that waited in vain for others which never ran have not failed."""
    ended = [pod for pod in view.pods if crashed(pod) and not _lost_peer(pod)]
    waited = [pod.termination for pod in ended if pod.termination is not None]
    in_vain = all(word.reason == PEERS_MISSING for word in waited) and len(waited) == len(ended)
    if attempt.running_time is not None or not waited or not in_vain:
        return None
    text = f"pod {ended[0].name} ran, but not all others did: {shorten(waited[0].message)}"
    return Judgement("Disrupted", Reason.PODS_NOT_TOGETHER, text)


def _failed(view: AttemptView, job: JobFacts) -> Judgement:
    """The pod that failed first is the cause; those that only lost their peer stand behind all others."""
    first = min((pod for pod in view.pods if crashed(pod) or _fell(pod)), key=_suspicion, default=None)
    if first is None or first.problem is None:
        return Judgement(
            "Failed", Reason.CRASHED, f"Job {job.name} failed: {shorten(job.failure)}", counted=True
        )
    # What the run does to itself (memory, data, a full volume) or to its peers says nothing of a node.
    node = first.node if first.problem.reason == Reason.CRASHED else None
    return Judgement("Failed", first.problem.reason, first.problem.message, counted=True, node=node)
