"""From the status of an object to one line for a reader. Pure: dicts in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Object = Mapping[str, Any]

_BAR_WIDTH = 24
_BAD_WHEN_TRUE = ("Failed", "Degraded")
_PHASES = ("pending", "running", "suspended")
"""States that come from a status rather than from rank 0."""
_USUAL = ("Starting", "Finished", "NotAccepted")
"""Reasons that say no more than the states of the pods, or what another condition says."""
_BAD_WHEN_FALSE = ("Accepted", "Running", "Ready")


def condition(obj: Object, kind: str) -> Mapping[str, Any] | None:
    """The condition of this type, if the status has it and it speaks of the present generation."""
    generation = obj.get("metadata", {}).get("generation")
    for entry in obj.get("status", {}).get("conditions", []):
        observed = entry.get("observedGeneration", generation)
        if entry.get("type") == kind and observed == generation:
            return dict(entry)
    return None


def is_true(obj: Object, kind: str) -> bool:
    """Whether the condition stands and is True."""
    found = condition(obj, kind)
    return found is not None and found["status"] == "True"


def sentence(obj: Object) -> str:
    """What stands in the way, in the words of the most telling condition; "" when all goes its usual way."""
    for kind, bad in [(k, "True") for k in _BAD_WHEN_TRUE] + [(k, "False") for k in _BAD_WHEN_FALSE]:
        found = condition(obj, kind)
        if found and found["status"] == bad and found.get("reason") not in _USUAL and found.get("message"):
            return f"{found.get('reason') or kind}: {found['message']}"
    return ""


@dataclass(frozen=True)
class Training:
    """How far a run is."""

    state: str
    """The phase or, once rank 0 answers, its own word: preparing, training, exporting, ..."""
    step: int = 0
    total: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None

    @property
    def share(self) -> float:
        """Steps done of all, 0 to 1."""
        return min(self.step / self.total, 1.0) if self.total else 0.0


def training(finetune: Object, progress: Object | None) -> Training:
    """Rank 0's own progress where it answers (every second), else the status (every few percent)."""
    status = finetune.get("status", {})
    if progress and progress.get("totalSteps"):
        return Training(
            state=str(progress.get("state", "")),
            step=int(progress.get("step", 0)),
            total=int(progress["totalSteps"]),
            loss=progress.get("loss"),
            tokens_per_second=progress.get("tokensPerSecond"),
            eta_seconds=progress.get("etaSeconds"),
        )
    state = str((progress or {}).get("state") or status.get("phase") or "Pending")
    return Training(
        state=state.lower(),
        step=int(status.get("step") or 0),
        total=int(status.get("totalSteps") or 0),
        loss=status.get("loss"),
        tokens_per_second=status.get("tokensPerSecond"),
    )


def furthest(before: Training, now: Training) -> Training:
    """The later of two looks at a run: a status, which lags behind rank 0, takes nothing back.

    Once rank 0 has ended, what is left is the end of its pods.
    """
    if now.total and now.state not in _PHASES:
        return now  # rank 0 itself; after a restart it may have gone back
    if before.total and before.step == before.total:
        return replace(before, state="trained, pods are ending:", eta_seconds=None)
    return before if before.step > now.step else now


def bar(run: Training) -> str:
    """`training ███████░░░░ 210/400  loss 0.812  2,950 tokens/s  ETA 25 s`."""
    full = round(run.share * _BAR_WIDTH)
    parts = [f"{run.state} {'█' * full}{'░' * (_BAR_WIDTH - full)} {run.step}/{run.total}"]
    if run.loss is not None:
        parts.append(f"loss {run.loss:.4f}")
    if run.tokens_per_second:
        parts.append(f"{run.tokens_per_second:,.0f} tokens/s")
    if run.eta_seconds is not None and run.step < run.total:
        parts.append(f"ETA {run.eta_seconds:.0f} s")
    return "  ".join(parts)


def pods_line(pods: Sequence[Object]) -> str:
    """`pod 0 Running, pod 1 ContainerCreating`: what a wait for pods waits for."""
    return ", ".join(f"{_pod_name(pod)} {_pod_state(pod)}" for pod in pods)


def _pod_name(pod: Object) -> str:
    """The part that a pod plays, since its full name is mostly random letters."""
    labels = pod["metadata"].get("labels", {})
    index = labels.get("batch.kubernetes.io/job-completion-index")
    part = labels.get("yuan2.dev/component")
    return f"pod {index}" if index is not None else str(part or pod["metadata"]["name"])


def _pod_state(pod: Object) -> str:
    status = pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason"):
            return str(waiting["reason"])
    return str(status.get("phase", "Pending"))
