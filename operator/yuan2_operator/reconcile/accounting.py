"""What the metrics count of runs: restarts, disruptions, and the time for which they hold GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from yuan2_operator.api.finetune import Attempt
from yuan2_operator.metrics import DISRUPTIONS, GPU_SECONDS, RESTARTS
from yuan2_operator.queue import Key
from yuan2_operator.status.attempts import World

VALUES_SHOWN = 100
"""Values of the chosen label that have series of their own; users write them."""
OTHER = "other"


def count_endings(namespace: str, before: Iterable[Attempt], after: Iterable[Attempt]) -> None:
    """Count the attempts that have ended between two statuses."""
    known = {attempt.number for attempt in before if attempt.outcome is not None}
    for attempt in after:
        if attempt.outcome is None or attempt.number in known:
            continue
        reason = attempt.reason or attempt.outcome
        if attempt.counted:
            RESTARTS.labels(namespace=namespace, reason=reason).inc()
        elif attempt.outcome == "Disrupted":
            DISRUPTIONS.labels(namespace=namespace, reason=reason).inc()


def pods_held(world: World) -> int:
    """Pods that are on a node and have not ended."""
    pods = [pod for view in world.views.values() for pod in view.pods]
    return sum(pod.node is not None and not pod.terminal for pod in pods)


@dataclass
class GpuMeter:
    """Adds up what each run holds between two passes; a run comes by at least at every resync."""

    label: str
    """Label of the resources whose value is told apart; empty for none."""
    _since: dict[Key, tuple[datetime, int]] = field(default_factory=dict)
    _values: set[str] = field(default_factory=set)

    def read(self, key: Key, labels: Mapping[str, str], gpus: int, now: datetime) -> None:
        """`gpus` are held from `now` on; what was held since the last reading is added."""
        at, held = self._since.pop(key, (now, 0))
        if held:
            seconds = max(0.0, (now - at).total_seconds())
            value = self._value(labels)
            GPU_SECONDS.labels(namespace=key.namespace, label=value).inc(held * seconds)
        if gpus:
            self._since[key] = (now, gpus)

    def _value(self, labels: Mapping[str, str]) -> str:
        value = labels.get(self.label, "") if self.label else ""
        if value not in self._values and len(self._values) >= VALUES_SHOWN:
            return OTHER
        self._values.add(value)
        return value
