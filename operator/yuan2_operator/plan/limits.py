"""How long each phase of an attempt may take. Pure.

The defaults are generous, since a healthy run that is ended costs more than a hang that is found late: they
suppose storage of 100 MB/s for a whole run, and a model of the largest preset where the size is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from yuan2_core.contract import TrainState
from yuan2_core.presets import PRESETS
from yuan2_core.sections import ModelSize
from yuan2_operator.api.finetune import FineTuneSpec

STEPS_AT_LEAST = 10
"""A training step may take so many times the mean of those before it."""

_BASE_AND_BILLION: dict[TrainState, tuple[int, int]] = {
    "starting": (14_400, 0),
    "preparing": (14_400, 0),
    "loading": (3_600, 160),
    "training": (1_800, 36),
    "evaluating": (3_600, 72),
    "saving": (3_600, 120),
    "exporting": (3_600, 160),
}
"""Seconds, and seconds for each billion parameters: 2 bytes of each to load, 12 to save, both to export."""


@dataclass(frozen=True)
class PhaseLimit:
    """The longest time without a sign of life in one phase."""

    seconds: float
    field: str
    """The field of the spec that changes it."""


def phase_limit(spec: FineTuneSpec, state: TrainState, mean_step: float | None = None) -> PhaseLimit | None:
    """The limit of a phase; None for one that is over as soon as it is told.

    Args:
        spec: of the run.
        state: what rank 0 says that it does.
        mean_step: seconds of an optimizer step so far.
    """
    if state not in _BASE_AND_BILLION:
        return None
    base, each = _BASE_AND_BILLION[state]
    default = float(base + each * _billions(spec.model.size))
    policy = spec.run_policy
    if state == "training":
        field, given = "spec.runPolicy.stallTimeoutSeconds", policy.stall_timeout_seconds
        default = max(default, STEPS_AT_LEAST * (mean_step or 0.0))
    else:
        phase = "preparing" if state == "starting" else state
        field = f"spec.runPolicy.phaseTimeoutSeconds.{phase}"
        given = getattr(policy.phase_timeout_seconds, phase)
    return PhaseLimit(default if given is None else float(given), field)


def _billions(size: ModelSize) -> int:
    """Billions of parameters, rounded up; of a `custom` model those of the largest preset."""
    known = {name: -(-preset.parameters // 10**9) for name, preset in PRESETS.items()}
    return known.get(size, max(known.values()))
