"""What the evaluations of a run have shown so far: pure, and kept exactly in every checkpoint."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from yuan2_trainer.data.order import Course, Position


class Standing(BaseModel):
    """The evaluations up to a step."""

    model_config = ConfigDict(frozen=True)

    evaluated_step: int | None = None
    """Step of the last evaluation."""
    loss: float | None = None
    """What it found; `None` where that was no finite number."""
    best_step: int | None = None
    """Step of the lowest loss. The model as it was given, evaluated before the first step, is not in the
    running: what a run exports is something that it trained."""
    best_loss: float | None = None
    worse: int = 0
    """Evaluations since that one."""

    def after(self, step: int, loss: float) -> Standing:
        """The standing after one more evaluation; only a lower loss is better."""
        known = loss if math.isfinite(loss) else None
        seen = {"evaluated_step": step, "loss": known}
        if step == 0:
            return self.model_copy(update=seen)
        if known is not None and (self.best_loss is None or known < self.best_loss):
            return self.model_copy(update={**seen, "best_step": step, "best_loss": known, "worse": 0})
        return self.model_copy(update={**seen, "worse": self.worse + 1})

    def exhausts(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row brought nothing better; never without a patience."""
        return patience is not None and self.worse >= patience

    def waits_for(self, step: int) -> bool:
        """Whether this step was not evaluated yet."""
        return self.evaluated_step != step


def is_due(position: Position, course: Course, every_steps: int | None, total_steps: int) -> bool:
    """Whether a run evaluates here: before its first step, after its last one, and between them every so
    many steps or, where `every_steps` is `None`, at the end of each epoch."""
    if position.step == 0 or position.step >= total_steps:
        return True
    if every_steps is not None:
        return position.step % every_steps == 0
    return position.offset >= course.epoch_length(position.epoch)
