"""What rank 0 writes into the output while a run goes on: `metrics.jsonl`, `loss.png`, `tensorboard/`."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from yuan2_core.contract import TrainJob
from yuan2_trainer.reporting.metrics import METRICS, MetricsLog
from yuan2_trainer.reporting.progress import EvaluationReport, StepReport
from yuan2_trainer.reporting.tensorboard_log import TensorBoardLog

PICTURE = "loss.png"
PICTURE_PAUSE = 300.0
"""Seconds between two pictures of a run: drawing one takes about two, in which no rank computes."""
_LOG = logging.getLogger(__name__)


class Recording:
    """Told of every step, evaluation and checkpoint."""

    def __init__(self, job: TrainJob, resumed_step: int, evaluated_step: int | None = None) -> None:
        self._output = Path(job.output)
        self._name = job.name
        self._tensorboard = (
            TensorBoardLog(self._output / "tensorboard", resumed_step) if job.tensorboard else None
        )
        self._metrics = MetricsLog(self._output / METRICS, resumed_step, evaluated_step)
        self._drawn_at = time.monotonic()

    def after_step(self, report: StepReport) -> None:
        self._metrics.append(report)
        if self._tensorboard is not None:
            self._tensorboard.step(report)

    def after_evaluation(self, report: EvaluationReport) -> None:
        self._metrics.append(report)
        if self._tensorboard is not None:
            self._tensorboard.evaluation(report)

    def after_checkpoint(self) -> None:
        """What was told so far survives the process; a new picture, unless the last one is recent."""
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if time.monotonic() - self._drawn_at >= PICTURE_PAUSE:
            self.draw()

    def close(self) -> None:
        """The run ended, for whatever reason."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def draw(self) -> None:
        """Draw `loss.png`; a picture that cannot be drawn stops no run."""
        try:
            from yuan2_trainer.reporting.plot import draw_losses

            draw_losses(self._output / METRICS, self._output / PICTURE, self._name)
        except Exception as error:  # noqa: BLE001 - whatever matplotlib or the volume has against it
            _LOG.warning("%s was not drawn: %s: %s", PICTURE, type(error).__name__, error)
        self._drawn_at = time.monotonic()
