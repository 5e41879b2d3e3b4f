"""Builders of Yuan2FineTune objects and of what the cluster shows of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from yuan2_core.contract import Progress

MINIMAL: dict[str, Any] = {
    "model": {"size": "custom", "source": {"persistentVolumeClaim": {"claimName": "models", "path": "base"}}},
    "dataset": {"source": {"persistentVolumeClaim": {"claimName": "data", "path": "alpaca.json"}}},
    "method": {"full": {}},
    "workers": {
        "replicas": 2,
        "processesPerWorker": 1,
        "resources": {"requests": {"cpu": "1000m", "memory": "1Gi"}},
        "sharedMemory": "512Mi",
    },
    "output": {"persistentVolumeClaim": {"claimName": "models", "path": "tuned"}},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `base` with `changes` merged in; None removes a field."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def finetune_object(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    """A Yuan2FineTune to apply: the minimal one with `spec` merged in."""
    return {
        "apiVersion": "yuan2.dev/v1alpha1",
        "kind": "Yuan2FineTune",
        "metadata": {"name": name, "namespace": namespace},
        "spec": merged(MINIMAL, spec),
    }


def progress_of(name: str, attempt: int = 1, step: int = 0, total: int = 100, **more: Any) -> Progress:
    """What rank 0 says in the middle of a training."""
    fields: dict[str, Any] = {
        "state": "training",
        "loss": 2.0 - step / 100,
        "learning_rate": 2e-5,
        "tokens_per_second": 1234.56,
        "eta_seconds": float(total - step),
        "last_step_age_seconds": 0.5,
        "seconds_in_steps": float(step),
        "seconds_total": step + 5.0,
        **more,
    }
    return Progress(name=name, attempt=attempt, step=step, total_steps=total, **fields)
