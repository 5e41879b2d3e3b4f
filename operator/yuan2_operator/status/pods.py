"""What a pod says about itself: facts for the state machines, a sentence for the user when it is in trouble.

Pure: a pod is the dict that the API server sent, `now` is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from pydantic import ValidationError

from yuan2_core.contract import EXIT_PREEMPTED, PEER_LOST, Termination
from yuan2_operator.constants import LABEL_ATTEMPT, TRAINER_CONTAINER, Reason

Pod = Mapping[str, Any]

LABEL_INDEX = "batch.kubernetes.io/job-completion-index"
LOST_AFTER = timedelta(seconds=120)
"""A pod this long past its deletion deadline is on a node that is gone: it is waited for no longer."""
MESSAGE_LIMIT = 600
"""Characters of a foreign message (scheduler, runtime, trainer) that are taken into a sentence."""

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
SIGNALS = {130: "SIGINT", 134: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}
KILLERS = {
    134: "a library gave up, such as NCCL or CUDA after an error",
    135: "a mapped file could not be read: a full /dev/shm or a volume that is gone",
    137: "its node ran out of memory, or somebody killed its main process or deleted it without grace",
    139: "a library crashed in native code",
}
"""Who ends a container by a signal that it does not outlive to say so."""
DISRUPTIONS = {
    "PreemptionByScheduler": "was preempted by a pod of higher priority",
    "DeletionByTaintManager": "was evicted: its node is tainted or does not answer",
    "EvictionByEvictionAPI": "was evicted through the API, as a node drain does",
    "DeletionByPodGC": "was removed: its node is gone",
    "TerminationByKubelet": "was terminated by its node, which shuts down or runs out of a resource",
}
"""Reasons of the pod condition DisruptionTarget (Kubernetes, "Pod disruption conditions")."""


@dataclass(frozen=True)
class Problem:
    """Why a pod does not run."""

    reason: str
    """CamelCase, one of `constants.Reason` or a `Termination.reason`."""
    message: str
    """A sentence: the pod, the cause, the way out."""


@dataclass(frozen=True)
class PodFacts:
    """The part of a pod that decisions are made of."""

    name: str
    index: int
    """Completion index, the node rank; 0 for pods that have none."""
    attempt: int
    """Attempt it belongs to; 0 for pods that have none."""
    phase: str
    node: str | None = None
    image: str | None = None
    """Of its main container, as it was asked for."""
    ip: str | None = None
    running: bool = False
    """Its main container runs."""
    ready: bool = False
    created: datetime | None = None
    started: datetime | None = None
    """When its main container started, the running one or the ended one."""
    finished: datetime | None = None
    exit_code: int | None = None
    """Of the main container, once ended."""
    deletion_requested: datetime | None = None
    delete_by: datetime | None = None
    """When its grace period ends (metadata.deletionTimestamp)."""
    disruption: str | None = None
    """Reason of its DisruptionTarget condition or, without one, of its eviction."""
    termination: Termination | None = None
    """What the main container left in its termination log."""
    problem: Problem | None = None
    waiting: str | None = None
    """What it waits for, as long as nothing is wrong."""

    @property
    def terminal(self) -> bool:
        """Its containers have ended for good."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def alive(self) -> bool:
        """Its main container runs or has ended well; a kubelet reports the end of the pod only afterwards."""
        return self.running or self.exit_code == 0 or self.phase == "Succeeded"

    def lost(self, now: datetime) -> bool:
        """Should have ended long ago, but nobody confirms it: its node is dead or cut off."""
        return not self.terminal and self.delete_by is not None and now > self.delete_by + LOST_AFTER

    def settled(self, now: datetime) -> bool:
        """Nothing of it runs any more, as far as anybody can tell."""
        return self.terminal or self.lost(now)


def read_pod(pod: Pod, container: str | None = TRAINER_CONTAINER) -> PodFacts:
    """Facts of one pod; `container` names the one that matters, None the first that is in trouble."""
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    labels = metadata.get("labels", {})
    state = _main_state(status, container)
    ended = state.get("terminated") or {}
    running = state.get("running") or {}
    deleted = parse_time(metadata.get("deletionTimestamp"))
    return PodFacts(
        name=metadata["name"],
        index=int(labels.get(LABEL_INDEX, 0)),
        attempt=int(labels.get(LABEL_ATTEMPT, 0)),
        phase=status.get("phase", "Pending"),
        node=spec.get("nodeName"),
        image=next(
            (c.get("image") for c in spec.get("containers", ()) if container in (None, c["name"])), None
        ),
        ip=status.get("podIP"),
        running=bool(running),
        ready=condition(status, "Ready").get("status") == "True",
        created=parse_time(metadata.get("creationTimestamp")),
        started=parse_time(running.get("startedAt") or ended.get("startedAt")),
        finished=parse_time(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        deletion_requested=deleted
        and deleted - timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0),
        delete_by=deleted,
        disruption=_disruption(status),
        termination=parse_termination(ended.get("message")),
        problem=diagnose(pod, container),
        waiting=starting(pod),
    )


def diagnose(pod: Pod, container: str | None = None) -> Problem | None:
    """What keeps a pod from running, or ended it; None when it runs, is starting normally or has succeeded.

    `container` restricts the look at containers to one; None takes the first one in trouble.
    """
    status = pod.get("status", {})
    name = pod["metadata"]["name"]
    disruption = _disruption(status)
    if disruption is not None:
        return _disrupted(name, disruption, status)
    if status.get("reason") == "Evicted":
        return Problem(Reason.EVICTED, f"pod {name} was evicted: {shorten(status.get('message', ''))}")
    if _phase(pod) == "Pending" and not pod.get("spec", {}).get("nodeName"):
        return _unschedulable(name, pod)
    for entry in _container_statuses(status, container):
        problem = _container_problem(name, pod, entry)
        if problem is not None:
            return problem
    if _phase(pod) == "Failed":
        cause = status.get("message") or status.get("reason") or "its node gave no reason"
        return Problem(Reason.CRASHED, f"pod {name} failed: {shorten(cause)}")
    return None


def starting(pod: Pod) -> str | None:
    """What a pod without a problem is waiting for, or None when it waits for nothing."""
    name, node = pod["metadata"]["name"], pod.get("spec", {}).get("nodeName")
    if _phase(pod) != "Pending":
        return None
    if node is None:
        return f"pod {name} is waiting for the scheduler"
    return f"pod {name} is being created on node {node}: {_preparing(pod)}"


def _preparing(pod: Pod) -> str:
    """What a node still does before a pod's containers can start."""
    spec = pod.get("spec", {})
    images = sorted({entry["image"] for entry in spec.get("containers", ()) if "image" in entry})
    claims = _claims(pod)
    pulling = f"image {', '.join(images)} is pulled" if images else "its image is pulled"
    mounting = f"claim {', '.join(claims)} is mounted" if claims else "its volumes are mounted"
    # The kubelet reports when network and volumes are there; only images are missing then.
    ready = condition(pod.get("status", {}), "PodReadyToStartContainers").get("status")
    if ready is None:
        return f"{mounting}, {pulling}"
    return pulling if ready == "True" else mounting


def _claims(pod: Pod) -> list[str]:
    """The claims that a pod mounts."""
    volumes = pod.get("spec", {}).get("volumes", ())
    return [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes
        if "persistentVolumeClaim" in volume
    ]


def first_problem(pods: Iterable[PodFacts]) -> Problem | None:
    """The problem to show of several: by severity of its kind, then by the order of the pods."""
    problems = [pod.problem for pod in pods if pod.problem is not None]
    return min(problems, key=_severity, default=None)


def requested(pod: Pod) -> str:
    """What a pod asks of a node: `8 nvidia.com/gpu, 4 cpu, 64Gi memory`; empty when it asks for nothing."""
    totals: dict[str, list[str]] = {}
    for entry in pod.get("spec", {}).get("containers", ()):
        resources = entry.get("resources", {})
        for resource, amount in {**resources.get("limits", {}), **resources.get("requests", {})}.items():
            totals.setdefault(resource, []).append(str(amount))
    ordered = sorted(totals.items(), key=lambda item: ("/" not in item[0], item[0]))
    return ", ".join(f"{' + '.join(amounts)} {resource}" for resource, amounts in ordered)


def parse_termination(message: str | None) -> Termination | None:
    """The trainer's or server's own termination message, or None when the text is not one."""
    if not message or not message.lstrip().startswith("{"):
        return None
    try:
        return Termination.read(message)
    except ValidationError:
        return None


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time of the API (`2026-01-02T03:04:05Z`, fractions allowed) as an aware datetime."""
    if not text:
        return None
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of that type, or an empty mapping."""
    found: Mapping[str, Any] = next(
        (entry for entry in status.get("conditions", ()) if entry.get("type") == kind), {}
    )
    return found


def shorten(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """One line of at most `limit` characters, without a final full stop."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _phase(pod: Pod) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _container_statuses(status: Mapping[str, Any], container: str | None) -> Sequence[Mapping[str, Any]]:
    main = [entry for entry in status.get("containerStatuses", ()) if container in (None, entry.get("name"))]
    return [*status.get("initContainerStatuses", ()), *main]


def _main_state(status: Mapping[str, Any], container: str | None) -> Mapping[str, Any]:
    entries = status.get("containerStatuses", ())
    entry: Mapping[str, Any] = next(
        (entry for entry in entries if container in (None, entry.get("name"))), {}
    )
    state: Mapping[str, Any] = entry.get("state", {})
    return state


def _disruption(status: Mapping[str, Any]) -> str | None:
    target = condition(status, "DisruptionTarget")
    if target.get("status") == "True":
        return str(target.get("reason") or "Disrupted")
    # An eviction for a pod's own excess (ephemeral storage) carries no DisruptionTarget: its own failure.
    return "NodeLost" if status.get("reason") == "NodeLost" else None


def _disrupted(name: str, disruption: str, status: Mapping[str, Any]) -> Problem:
    reasons = {
        "PreemptionByScheduler": Reason.PREEMPTED,
        "EvictionByEvictionAPI": Reason.DRAINED,
        "NodeLost": Reason.NODE_LOST,
        "DeletionByPodGC": Reason.NODE_LOST,
    }
    text = DISRUPTIONS.get(disruption, f"was disrupted ({disruption})")
    detail = status.get("message") or condition(status, "DisruptionTarget").get("message") or ""
    message = f"pod {name} {text}" + (f": {shorten(detail)}" if detail else "")
    return Problem(reasons.get(disruption, Reason.EVICTED), message)


def _unschedulable(name: str, pod: Pod) -> Problem | None:
    scheduled = condition(pod.get("status", {}), "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    if scheduled.get("reason") == "SchedulingGated":
        return Problem(
            Reason.UNSCHEDULABLE, f"pod {name} is held back by a scheduling gate, as a queue sets one"
        )
    wants = requested(pod)
    cause = shorten(scheduled.get("message", "the scheduler gave no reason").split(" preemption:")[0])
    asks = f"wants {wants} and " if wants else ""
    if "PersistentVolumeClaim" in cause or "volume" in cause:
        text = f"pod {name} waits for its volumes (claim {', '.join(_claims(pod))}): {cause}"
        way_out = "`kubectl describe pvc` says what a claim lacks"
        return Problem(Reason.UNSCHEDULABLE, f"{text}; {way_out}")
    way_out = "ask for less, loosen nodeSelector, affinity or tolerations, or add nodes that fit"
    return Problem(Reason.UNSCHEDULABLE, f"pod {name} {asks}fits no node: {cause}; {way_out}")


def _container_problem(name: str, pod: Pod, entry: Mapping[str, Any]) -> Problem | None:
    state = entry.get("state", {})
    waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
    if ended:
        return _ended(name, pod, entry, ended)
    reason = waiting.get("reason", "")
    cause = shorten(waiting.get("message") or reason)
    if reason in IMAGE_REASONS:
        text = (
            f"pod {name} cannot pull image {entry.get('image')}: {cause}; check its name and imagePullSecrets"
        )
        return Problem(Reason.IMAGE_PULL_FAILED, text)
    if reason in CONFIG_REASONS:
        text = f"container {entry.get('name')} of pod {name} cannot be started: {cause}"
        return Problem(Reason.CONTAINER_CONFIG_ERROR, text)
    if reason == "CrashLoopBackOff":
        return _crash_loop(name, pod, entry)
    return None


def _crash_loop(name: str, pod: Pod, entry: Mapping[str, Any]) -> Problem:
    last = (entry.get("lastState") or {}).get("terminated") or {}
    cause = _ended(name, pod, entry, last) if last else None
    if cause is None:
        text = (
            f"container {entry.get('name')} of pod {name} keeps ending: read `kubectl logs {name} --previous`"
        )
        return Problem(Reason.CRASH_LOOP, text)
    return Problem(cause.reason if cause.reason != Reason.CRASHED else Reason.CRASH_LOOP, cause.message)


def _ended(name: str, pod: Pod, entry: Mapping[str, Any], ended: Mapping[str, Any]) -> Problem | None:
    code = int(ended.get("exitCode", 0))
    if code == 0:
        return None
    if ended.get("reason") == "OOMKilled":
        return Problem(Reason.OUT_OF_MEMORY, _out_of_memory(name, pod, entry))
    termination = parse_termination(ended.get("message"))
    if termination is not None:
        text = f"pod {name} ended with exit code {code}: {shorten(termination.message)}"
        return Problem(termination.reason, text)
    if code == EXIT_PREEMPTED:
        return Problem(Reason.PREEMPTED, f"pod {name} was asked to stop (SIGTERM); its last checkpoint stays")
    if code in KILLERS:
        # What the runtime offers instead of the container's own word is the end of its log.
        text = f"pod {name} was ended by {SIGNALS[code]}: {KILLERS[code]}; read `kubectl logs {name}`"
        return Problem(Reason.CRASHED, text)
    signal = f" ({SIGNALS[code]})" if code in SIGNALS else ""
    cause = shorten(ended.get("message") or "") or f"read `kubectl logs {name}`"
    return Problem(Reason.CRASHED, f"pod {name} ended with exit code {code}{signal}: {cause}")


def _out_of_memory(name: str, pod: Pod, entry: Mapping[str, Any]) -> str:
    containers = pod.get("spec", {}).get("containers", ())
    resources: Mapping[str, Any] = next(
        (c.get("resources", {}) for c in containers if c.get("name") == entry.get("name")), {}
    )
    limit = resources.get("limits", {}).get("memory")
    if limit is None:
        return f"pod {name} was killed: its node ran out of memory; set resources.requests.memory"
    return f"pod {name} was killed: it outgrew its memory limit of {limit}; raise resources.limits.memory"


def _severity(problem: Problem) -> int:
    order = (Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_CONFIG_ERROR)
    if problem.reason == PEER_LOST:
        return len(order) + 1
    return order.index(problem.reason) if problem.reason in order else len(order)
