"""What makes two attempts parts of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from yuan2_core.contract import TrainJob
from yuan2_core.resuming import FREE_TRAINING
from yuan2_core.sections import Method, Training
from yuan2_trainer.data.prepare import Prepared

_EVALUATION = "dataset.evalSource"
_BASE = "model.files"
_DEFAULTS = {
    f"training.{name}": value for name, value in Training().model_dump(mode="json", by_alias=True).items()
}


def run_identity(job: TrainJob, prepared: Prepared) -> dict[str, Any]:
    """Field name to value of everything that must stay the same while a run goes on from its checkpoints.

    Args:
        job: what to train.
        prepared: knows the fingerprints of the data and of the base model.
    """
    training = job.training.model_dump(mode="json", by_alias=True, exclude_none=True)
    fields = {f"training.{name}": value for name, value in training.items() if name not in FREE_TRAINING}
    method = job.method.model_dump(mode="json", by_alias=True, exclude_none=True)
    if job.objective.sequences > 1:
        fields["objective"] = job.objective.model_dump(mode="json", by_alias=True, exclude_none=True)
    if job.dataset.eval_fraction > 0:
        fields["dataset.evalFraction"] = job.dataset.eval_fraction
    if prepared.eval_fingerprint is not None:
        fields[_EVALUATION] = prepared.eval_fingerprint
    base = {"model.size": job.model.size, _BASE: prepared.base_fingerprint}
    return {**fields, **base, "method": method, "dataset": prepared.fingerprint}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed, in words.

    Args:
        before: from a checkpoint or record, perhaps of an earlier release, which knew fewer fields. What it
            does not name was at its default; which base it trained it does not tell, and is believed.
        now: of the job as it is.
    """
    known = _as_of_today(before, now)
    changed = [name for name in sorted({*known, *now}) if known.get(name) != now.get(name)]
    return [_difference(name, known.get(name), now.get(name)) for name in changed]


def names_its_base(identity: Mapping[str, Any]) -> bool:
    """Whether an output tells which base model it was trained from; earlier releases did not."""
    return _BASE in identity


def _as_of_today(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    known = dict(before)
    for name, value in now.items():
        if name not in known and (name == _BASE or (name in _DEFAULTS and value == _DEFAULTS[name])):
            known[name] = value
    try:
        method = Method.model_validate(known.get("method"))
    except ValidationError:
        return known
    return {**known, "method": method.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _difference(name: str, before: object, now: object) -> str:
    if name == "dataset":
        return "the prepared data (dataset, tokenizer or maxLength) changed"
    if name == _EVALUATION:
        return "the data of dataset.evalSource, which its evaluations are compared on, changed"
    if name == _BASE:
        return "the base model (config.json or the weights of model.source) changed"
    return f"{name} was {_shown(before)} and is {_shown(now)}"


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)
