"""The learning rate of a step, a pure function.

The formulas are those of `transformers.optimization.get_{cosine,linear,constant}_schedule_with_warmup`,
which the published recipe trains with, and of `get_wsd_schedule`: the step counted from 0, so that a warm-up
starts at 0.
"""

from __future__ import annotations

import math

from yuan2_core.sections import DEFAULT_DECAY_RATIO, DEFAULT_WARMUP_RATIO, Schedule, Training


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Steps in which the rate rises, rounded up as `TrainingArguments.get_warmup_steps` does."""
    return math.ceil(total_steps * ratio)


def warmup_of(training: Training, total_steps: int) -> int:
    """Warm-up steps of a run: as given in steps or as a ratio, else by the published recipe's ratio."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    ratio = DEFAULT_WARMUP_RATIO if training.warmup_ratio is None else training.warmup_ratio
    return warmup_steps(total_steps, ratio)


def decay_of(training: Training, total_steps: int) -> int:
    """Steps in which the rate falls: all after the warm-up, or with `wsd` the last ones."""
    after = max(1, total_steps - warmup_of(training, total_steps))
    if training.schedule != "wsd":
        return after
    if training.decay_steps is not None:
        return min(after, training.decay_steps)
    ratio = DEFAULT_DECAY_RATIO if training.decay_ratio is None else training.decay_ratio
    return min(after, max(1, math.ceil(total_steps * ratio)))


def learning_rate(training: Training, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (0-based)."""
    warmup, decay = warmup_of(training, total_steps), decay_of(training, total_steps)
    factor = rate_factor(step, total_steps, warmup, training.schedule, decay)
    floor = 0.0 if step < warmup else training.min_learning_rate
    return floor + (training.learning_rate - floor) * factor


def rate_factor(step: int, total_steps: int, warmup: int, schedule: Schedule, decay: int = 1) -> float:
    """How far the rate is from what it falls to (0) towards the peak (1) in optimizer step `step` (0-based).

    It rises from nothing in the first `warmup` steps; with `wsd` it falls in the last `decay` steps.
    """
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        warmup = max(warmup, total_steps - decay)
        if step < warmup:
            return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
