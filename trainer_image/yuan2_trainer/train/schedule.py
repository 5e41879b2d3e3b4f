"""The learning rate of a step, a pure function.

The formulas are those of `transformers.optimization.get_{cosine,linear,constant}_schedule_with_warmup`,
which the published recipe trains with: the step counted from 0, so that a warm-up starts at 0.
"""

from __future__ import annotations

import math

from yuan2_core.sections import DEFAULT_WARMUP_RATIO, Schedule, Training


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Steps in which the rate rises, rounded up as `TrainingArguments.get_warmup_steps` does."""
    return math.ceil(total_steps * ratio)


def warmup_of(training: Training, total_steps: int) -> int:
    """Warm-up steps of a run: as given in steps or as a ratio, else by the published recipe's ratio."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    ratio = DEFAULT_WARMUP_RATIO if training.warmup_ratio is None else training.warmup_ratio
    return warmup_steps(total_steps, ratio)


def rate_factor(step: int, total_steps: int, warmup: int, schedule: Schedule) -> float:
    """What the peak rate is multiplied by in optimizer step `step` (0-based): a number in [0, 1].

    It rises in the first `warmup` steps.
    """
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
