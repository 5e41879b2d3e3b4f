"""What is seen of a service becomes its status. Pure: the observation and the time are passed in.

`Accepted`     the spec and what it refers to can be served
`Ready`        a request is answered: controller, API server and a worker are available
`Progressing`  pods are being made or replaced
`Degraded`     something is broken, whether or not requests are still answered
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from yuan2_operator.api.service import ServicePhase, ServiceSpec, ServiceStatus
from yuan2_operator.constants import (
    ANNOTATION_CONFIG_HASH,
    ANNOTATION_MODEL_FINGERPRINT,
    COMPONENT_API,
    COMPONENT_CONTROLLER,
    COMPONENT_WORKER,
    CONDITION_ACCEPTED,
    CONDITION_DEGRADED,
    CONDITION_PROGRESSING,
    CONDITION_READY,
    LABEL_COMPONENT,
    Reason,
)
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.references import Rejection
from yuan2_operator.plan.service import (
    ServicePlan,
    component_name,
    components,
    public_url,
    revision,
    worker_selector,
)
from yuan2_operator.status.conditions import Verdict, is_true, set_conditions
from yuan2_operator.status.pods import Pod, Problem, first_problem, read_pod, starting

Deployment = Mapping[str, Any]

_HINTS = {
    COMPONENT_CONTROLLER: "the controller is starting",
    COMPONENT_WORKER: "the worker is loading the model and registers with the controller afterwards",
    COMPONENT_API: "the API server is starting",
}


@dataclass(frozen=True)
class ServiceObservation:
    """The children of a service as the API server has them."""

    deployments: Mapping[str, Deployment]
    """By name."""
    pods: Sequence[Pod]
    """All pods with the service's label."""


@dataclass(frozen=True)
class Component:
    """Where the pods of one component stand."""

    name: str
    wanted: int
    existing: int
    ready: int
    available: int
    """Those that have been ready for the Deployment's minReadySeconds: their address works everywhere."""
    settled: bool
    """Every pod is of the newest template, and as many are available as are wanted."""
    gave_up: str | None
    """The Deployment's own message when its progress deadline has passed."""
    problem: Problem | None
    waiting: str | None
    """What a pod that is starting waits for."""

    @property
    def short(self) -> bool:
        """Fewer pods are available than are wanted."""
        return self.available < self.wanted


def service_status(
    owner: Owner,
    spec: ServiceSpec,
    decision: ServicePlan | Rejection,
    observation: ServiceObservation,
    prior: ServiceStatus,
    *,
    now: datetime,
) -> ServiceStatus:
    """The status that follows from what was decided and what is seen."""
    parts = [observe_component(owner, spec, decision, observation, name) for name in components(spec)]
    verdicts = _verdicts(owner, spec, decision, parts)
    conditions = set_conditions(prior.conditions, verdicts, now=now, generation=owner.generation)
    workers = next(part for part in parts if part.name == COMPONENT_WORKER)
    accepted = isinstance(decision, ServicePlan)
    return ServiceStatus(
        observed_generation=owner.generation,
        phase=_phase(verdicts),
        conditions=conditions,
        url=public_url(owner, spec) if accepted else prior.url,
        workers=f"{workers.ready}/{workers.wanted}",
        worker_replicas=workers.existing,
        ready_workers=workers.ready,
        selector=worker_selector(owner),
        model=decision.model if isinstance(decision, ServicePlan) else prior.model,
    )


def observe_component(
    owner: Owner,
    spec: ServiceSpec,
    decision: ServicePlan | Rejection,
    observation: ServiceObservation,
    name: str,
) -> Component:
    """Read one component's Deployment and pods."""
    wanted = {COMPONENT_WORKER: spec.worker.replicas, COMPONENT_API: spec.api.replicas}.get(name, 1)
    deployment = observation.deployments.get(component_name(owner.name, name), {})
    status = deployment.get("status", {})
    expected = revision(decision, name) if isinstance(decision, ServicePlan) else {}
    pods = [pod for pod in observation.pods if _belongs(pod, name)]
    return Component(
        name=name,
        wanted=wanted,
        existing=int(status.get("replicas") or 0),
        ready=int(status.get("readyReplicas") or 0),
        available=int(status.get("availableReplicas") or 0),
        settled=_settled(deployment, wanted, expected),
        gave_up=_gave_up(status),
        problem=_problem(pods),
        waiting=next((text for text in map(starting, pods) if text is not None), None),
    )


def _belongs(pod: Pod, component: str) -> bool:
    metadata = pod["metadata"]
    return metadata.get("labels", {}).get(LABEL_COMPONENT) == component and not metadata.get(
        "deletionTimestamp"
    )


def _settled(deployment: Deployment, wanted: int, expected: Mapping[str, str]) -> bool:
    if not deployment:
        return False
    status = deployment.get("status", {})
    current = int(status.get("observedGeneration") or 0) >= int(deployment["metadata"].get("generation") or 0)
    template = deployment.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
    known = (ANNOTATION_CONFIG_HASH, ANNOTATION_MODEL_FINGERPRINT)
    newest = all(template.get(key) == expected[key] for key in known if key in expected)
    counts = (int(status.get(key) or 0) for key in ("replicas", "updatedReplicas", "availableReplicas"))
    return current and newest and all(count == wanted for count in counts)


def _gave_up(status: Mapping[str, Any]) -> str | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return str(condition.get("message") or "no progress within its deadline")
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message") or "its pods cannot be created")
    return None


def _problem(pods: Iterable[Pod]) -> Problem | None:
    """Trouble of living pods first; ended ones, which their ReplicaSet has replaced, only without another."""
    facts = [read_pod(_as_ended(pod), None) for pod in pods]
    living = [pod for pod in facts if not pod.terminal]
    return first_problem(living) or (first_problem(facts) if not living else None)


def _as_ended(pod: Pod) -> Pod:
    """The pod as it was before its container was started again, until that one is ready.

    A container that keeps crashing runs for a moment between two crashes; its trouble is shown all the while.
    """
    status = pod.get("status", {})
    entries = [
        {**entry, "state": entry["lastState"]} if _failed_before(entry) else entry
        for entry in status.get("containerStatuses", ())
    ]
    return {**pod, "status": {**status, "containerStatuses": entries}}


def _failed_before(entry: Mapping[str, Any]) -> bool:
    last = (entry.get("lastState") or {}).get("terminated") or {}
    restarted = "running" in (entry.get("state") or {})
    return restarted and not entry.get("ready") and bool(last.get("exitCode"))


def _verdicts(
    owner: Owner, spec: ServiceSpec, decision: ServicePlan | Rejection, parts: Sequence[Component]
) -> list[Verdict]:
    degraded = _degraded(parts)
    if isinstance(decision, Rejection):
        return [
            Verdict(CONDITION_ACCEPTED, "False", decision.reason, decision.message),
            _ready_all_the_same(owner, spec, decision, parts),
            Verdict(
                CONDITION_PROGRESSING, "False", Reason.NOT_ACCEPTED, "nothing is changed until it is accepted"
            ),
            # Without a plan, pods that are not there are not missing; those that are may still be broken.
            degraded if any(part.existing for part in parts) else _healthy(),
        ]
    accepted = f"serves {decision.spec.model.name} from {decision.note}"
    return [
        Verdict(CONDITION_ACCEPTED, "True", Reason.VALID, accepted),
        _ready(owner, spec, parts),
        _progressing(parts),
        degraded,
    ]


def _ready(owner: Owner, spec: ServiceSpec, parts: Sequence[Component]) -> Verdict:
    if spec.worker.replicas == 0:
        message = f"scaled to zero workers: `kubectl scale y2svc/{owner.name} --replicas=1` wakes it"
        return Verdict(CONDITION_READY, "False", Reason.SCALED_TO_ZERO, message)
    for name in (COMPONENT_CONTROLLER, COMPONENT_WORKER, COMPONENT_API):
        part = next(part for part in parts if part.name == name)
        if part.available == 0:
            return _not_ready(part)
    message = f"answers at {public_url(owner, spec)}"
    return Verdict(CONDITION_READY, "True", Reason.READY, message)


def _ready_all_the_same(
    owner: Owner, spec: ServiceSpec, decision: Rejection, parts: Sequence[Component]
) -> Verdict:
    """What runs goes on answering while a Secret is missing, say; without pods nothing does."""
    ready = _ready(owner, spec, parts)
    if ready.status == "True":
        return Verdict(
            ready.type, "True", ready.reason, f"{ready.message}, as it was before: {decision.message}"
        )
    return Verdict(CONDITION_READY, "False", Reason.NOT_ACCEPTED, decision.message)


def _not_ready(part: Component) -> Verdict:
    if part.problem is not None:
        return Verdict(CONDITION_READY, "False", part.problem.reason, part.problem.message)
    if part.gave_up is not None and part.waiting is None:
        return Verdict(CONDITION_READY, "False", Reason.NOT_READY, f"{part.name}: {part.gave_up}")
    hint = f": {_HINTS[part.name]}" if part.existing and not part.ready else ""
    return Verdict(CONDITION_READY, "False", Reason.STARTING, part.waiting or f"{_counts(part)}{hint}")


def _progressing(parts: Sequence[Component]) -> Verdict:
    moving = [part for part in parts if not part.settled]
    if not moving:
        return Verdict(
            CONDITION_PROGRESSING, "False", Reason.ROLLED_OUT, "every pod is ready and of the newest spec"
        )
    message = "; ".join(_counts(part) for part in moving)
    return Verdict(CONDITION_PROGRESSING, "True", Reason.ROLLING_OUT, message)


def _degraded(parts: Sequence[Component]) -> Verdict:
    problems = [part.problem for part in parts if part.problem is not None and not part.settled]
    if problems:
        message = "; ".join(problem.message for problem in problems)
        return Verdict(CONDITION_DEGRADED, "True", problems[0].reason, message)
    stuck = [part for part in parts if part.short and part.gave_up is not None]
    if stuck:
        message = "; ".join(f"{_counts(part)}: {part.gave_up}" for part in stuck)
        return Verdict(CONDITION_DEGRADED, "True", Reason.PODS_MISSING, message)
    return _healthy()


def _healthy() -> Verdict:
    return Verdict(CONDITION_DEGRADED, "False", Reason.HEALTHY, "no pod is in trouble")


def _counts(part: Component) -> str:
    text = f"{part.ready} of {part.wanted} {part.name} pods are ready"
    fresh = part.ready - part.available
    return f"{text}, {fresh} of them only just: nodes are told of its address" if fresh > 0 else text


def _phase(verdicts: Sequence[Verdict]) -> ServicePhase:
    holds = {verdict.type: verdict.status == "True" for verdict in verdicts}
    if not holds[CONDITION_ACCEPTED]:
        return "Pending"
    if holds[CONDITION_DEGRADED]:
        return "Degraded"
    return "Ready" if holds[CONDITION_READY] else "Progressing"


def is_settled(status: ServiceStatus) -> bool:
    """Whether every pod is ready and of the newest spec."""
    return any(
        condition.type == CONDITION_PROGRESSING and condition.reason == Reason.ROLLED_OUT
        for condition in status.conditions
    )


def is_ready(status: ServiceStatus) -> bool:
    """Whether requests are answered."""
    return is_true(status.conditions, CONDITION_READY)
