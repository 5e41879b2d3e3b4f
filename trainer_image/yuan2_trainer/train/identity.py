"""What makes two attempts parts of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yuan2_core.contract import TrainJob

_FREE = (
    "microBatchSize",
    "gradientAccumulationSteps",
    "gradientCheckpointing",
    "gradientCheckpointingEvery",
    "packing",
    "tf32",
)
"""Fields of `training` that may change between attempts: they decide how fast a step is, not what is
learned from which sample."""

_EVALUATION = "dataset.evalSource"


def run_identity(job: TrainJob, data_fingerprint: str, eval_fingerprint: str | None = None) -> dict[str, Any]:
    """Field name to value of everything that must stay the same while a run goes on from its checkpoints.

    Args:
        job: what to train.
        data_fingerprint: of the training data, what is held out of them included.
        eval_fingerprint: of other data to evaluate on.
    """
    training = job.training.model_dump(mode="json", by_alias=True, exclude_none=True)
    fields = {f"training.{name}": value for name, value in training.items() if name not in _FREE}
    method = job.method.model_dump(mode="json", by_alias=True, exclude_none=True)
    if job.dataset.eval_fraction > 0:
        fields["dataset.evalFraction"] = job.dataset.eval_fraction
    if eval_fingerprint is not None:
        fields[_EVALUATION] = eval_fingerprint
    return {**fields, "model.size": job.model.size, "method": method, "dataset": data_fingerprint}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed, in words."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [_difference(name, before.get(name), now.get(name)) for name in changed]


def _difference(name: str, before: object, now: object) -> str:
    if name == "dataset":
        return "the prepared data (dataset, tokenizer or maxLength) changed"
    if name == _EVALUATION:
        return "the data of dataset.evalSource, which its evaluations are compared on, changed"
    return f"{name} was {_shown(before)} and is {_shown(now)}"


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)
