"""From the status of an object to one line for a reader. Pure: dicts in, words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

_BAR_WIDTH = 24
_BAD_WHEN_TRUE = ("Failed", "Degraded")
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
    """What stands in the way, in the words of the most telling condition; "" when nothing does."""
    for kind, bad in [(k, "True") for k in _BAD_WHEN_TRUE] + [(k, "False") for k in _BAD_WHEN_FALSE]:
        found = condition(obj, kind)
        if found and found["status"] == bad and found.get("message"):
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
    """`identity-1-0 Running, identity-1-1 ContainerCreating`: what a wait for pods waits for."""
    return ", ".join(f"{pod['metadata']['name']} {_pod_state(pod)}" for pod in pods)


def _pod_state(pod: Object) -> str:
    status = pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason"):
            return str(waiting["reason"])
    return str(status.get("phase", "Pending"))
