"""TensorBoard's view of a run, in `<output>/tensorboard`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.reporting.progress import EvaluationReport, StepReport


class TensorBoardLog:
    """Scalars by optimizer step; a resumed run hides what was logged of the steps that it does again.

    Raises:
        JobError: this image has no TensorBoard.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise JobError(
                f"tensorboard: this image has no package tensorboard ({error}); leave tensorboard out, or "
                "use an image that has it"
            ) from error
        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def step(self, report: StepReport) -> None:
        """Log a training step."""
        self._scalars(
            report.step,
            {
                "train/loss": report.loss,
                "train/learning_rate": report.learning_rate,
                "train/grad_norm": report.grad_norm,
                "train/epoch": report.epoch,
                "speed/tokens_per_second": report.tokens_per_second,
                "speed/mfu": report.mfu,
                "speed/memory_bytes": report.memory_bytes,
                **{f"rewards/{name}": value for name, value in (report.rewards or {}).items()},
            },
        )

    def evaluation(self, report: EvaluationReport) -> None:
        """Log an evaluation."""
        values = {"evaluation/loss": report.eval_loss, "evaluation/perplexity": report.perplexity}
        rewards = {f"evaluation/rewards_{name}": value for name, value in (report.rewards or {}).items()}
        self._scalars(report.step, {**values, **rewards})

    def flush(self) -> None:
        """Bring what was logged to the disk."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for tag, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(tag, value, step)
