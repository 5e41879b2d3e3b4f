"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from yuan2_core.contract import TrainJob
from yuan2_trainer.checkpoint.checkpoints import Checkpoints
from yuan2_trainer.data.order import Course, Indices, Position, epoch_order
from yuan2_trainer.evaluation.judging import Judge, preempted_before
from yuan2_trainer.pod.outcome import JobError, PreemptedError
from yuan2_trainer.pod.stopping import AskedToEndError
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.mfu import Meter
from yuan2_trainer.reporting.progress import StepReport, Tracker
from yuan2_trainer.reporting.step_log import Recording
from yuan2_trainer.train.schedule import learning_rate
from yuan2_trainer.train.step import Stepper, StepResult, Wishes

NOT_FINITE_LIMIT = 3
"""Steps in a row whose loss or gradient is not finite after which a run stops, lost weights or not."""

_LOG = logging.getLogger(__name__)


@dataclass
class Loop:
    """Steps from a position to the end, with checkpoints on the way."""

    job: TrainJob
    workspace: Workspace
    stepper: Stepper
    course: Course
    checkpoints: Checkpoints
    identity: dict[str, Any]
    total_steps: int
    last_checkpoint: int | None
    meter: Meter
    tracker: Tracker | None = None
    """Of one rank a node: its launcher wants to know."""
    recording: Recording | None = None
    """Of rank 0."""
    judge: Judge | None = None
    """Of runs that hold data out."""
    samples: Indices | None = None
    """What is trained on; `None`: all samples."""
    clock: Callable[[], float] = time.monotonic
    """Seconds; that of rank 0 says when a checkpoint is due by time."""
    _orders: dict[int, Indices] = field(default_factory=dict)
    _not_finite: int = 0
    """Steps in a row, up to here, whose loss or gradient was not finite."""
    _lost: bool = False
    """One of them changed the weights, which are worth nothing since."""
    _saved_at: float = 0.0
    """When the last checkpoint was begun."""

    def __post_init__(self) -> None:
        self._saved_at = self.clock()

    def run(self, position: Position) -> Position:
        """Train to the end of the course, or until evaluations bring nothing better.

        Raises:
            PreemptedError: the pod was asked to end; a checkpoint was written, unless nothing was done yet.
            JobError: the loss stopped being a number.
            OutputFullError: no room for a checkpoint.
        """
        if self._judge(position, stop=False):
            raise preempted_before(position.step)
        for after, epoch, first, last in self.course.steps(position):
            if self.judge is not None and self.judge.exhausted:
                self._tell(total_steps=position.step)
                break
            began = time.monotonic()
            rate = learning_rate(self.job.training, position.step, self.total_steps)
            seed_step(self.job.training.seed, position.step)
            try:
                result = self.stepper.run(self._order(epoch)[first:last], rate, self._wishes)
            except AskedToEndError as error:
                raise self._preempted(position) from error
            position = after
            self._report(position, rate, result, time.monotonic() - began)
            self._note_checkpoint(self.checkpoints.completed())
            self._watch_loss(position, result)
            self._after_step(position, result)
        self._note_checkpoint(self.checkpoints.finish())
        if self._lost:
            raise self._failure(position)
        if position.step not in (0, self.last_checkpoint):
            # The export of a large model takes long: what interrupts it must not cost the last steps.
            self.save(position, overlap=False)
        return position

    def _lasts(self, position: Position) -> bool:
        """Whether a checkpoint of this step is kept beside newer ones."""
        leads = self.judge is not None and self.judge.leads(position)
        return leads or position.step % self.job.checkpoint.every_steps == 0

    def _wishes(self) -> Wishes:
        overdue = self.clock() - self._saved_at >= self.job.checkpoint.every_seconds
        return Wishes(self.workspace.stop.exists(), overdue)

    def _after_step(self, position: Position, result: StepResult) -> None:
        stop = self._judge(position, result.stop)
        due = result.save or self._lasts(position)
        if self._ended(position) or not (due or stop) or self._lost:
            return
        if stop:
            raise self._preempted(position)
        self.save(position)

    def _preempted(self, position: Position) -> PreemptedError:
        """Saves what has been done since the last checkpoint, unless it is lost."""
        self._note_checkpoint(self.checkpoints.finish())
        if self._lost or position.step in (0, self.last_checkpoint):
            return preempted_before(self.last_checkpoint or 0)
        self.save(position, overlap=False)
        # Rank 0 may still remove older checkpoints or draw, and a rank that ends takes others with it.
        dist.barrier()
        return PreemptedError(
            f"asked to end: checkpoint written at step {position.step} of {self.total_steps}, "
            "the next attempt goes on from there"
        )

    def _judge(self, position: Position, stop: bool) -> bool:
        """Evaluate if it is due; returns whether the pod was asked to end, before or meanwhile."""
        if self.judge is None or stop or not self.judge.pending(position, self.total_steps):
            return stop
        try:
            self.judge.evaluate(position)
        except AskedToEndError:
            return True
        return False

    def _ended(self, position: Position) -> bool:
        """Whether nothing is left but the last checkpoint and the export."""
        judged = self.judge is None or not self.judge.pending(position, self.total_steps)
        return position.step >= self.total_steps and judged

    def save(self, position: Position, overlap: bool = True) -> None:
        """Write a checkpoint, beside the following steps if `overlap`."""
        self._tell(state="saving")
        self._saved_at = self.clock()
        facts: dict[str, Any] = {
            "total_steps": self.total_steps,
            "stage": self.job.stage,
            "identity": self.identity,
            "lasting": self._lasts(position),
        }
        if self.judge is not None:
            facts["standing"] = self.judge.standing
        self.checkpoints.save(self.stepper.engine, position, facts, overlap)
        self._tell(state="training")
        self._note_checkpoint(self.checkpoints.completed())

    def _note_checkpoint(self, step: int | None) -> None:
        """Tell of a checkpoint once it is complete."""
        if step is not None and step != self.last_checkpoint:
            self.last_checkpoint = step
            self._tell(last_checkpoint_step=step)
            if self.recording is not None:
                _LOG.info("checkpoint of step %d is complete", step)
                self.recording.after_checkpoint()

    def _order(self, epoch: int) -> Indices:
        if epoch not in self._orders:
            conversations = self.stepper.store.conversations
            if self.samples is not None:
                conversations = conversations[self.samples]
            order = epoch_order(conversations, self.job.training.seed, epoch)
            self._orders = {epoch: order if self.samples is None else self.samples[order]}
        return self._orders[epoch]

    def _watch_loss(self, position: Position, result: StepResult) -> None:
        self._not_finite = 0 if result.is_finite else self._not_finite + 1
        self._lost = not result.is_finite and (self._lost or result.applied)
        if not result.is_finite and not self._lost and self.recording is not None:
            _LOG.warning("step %d: the gradient is not finite; its batch was skipped", position.step)
        if self._not_finite >= NOT_FINITE_LIMIT:
            self._note_checkpoint(self.checkpoints.finish())
            raise self._failure(position)

    def _failure(self, position: Position) -> JobError:
        """Another attempt would come to the same end, so this one is the last."""
        saved = (
            "there is no checkpoint"
            if self.last_checkpoint is None
            else f"the last good checkpoint is that of step {self.last_checkpoint}"
        )
        return JobError(
            f"training: the loss or its gradient was not a finite number from step "
            f"{position.step - self._not_finite + 1} to {position.step}; {saved}; train anew, with another "
            "output path, a lower training.learningRate, a longer warm-up, or without the data that cause it"
        )

    def _report(self, position: Position, rate: float, result: StepResult, seconds: float) -> None:
        if self.tracker is None:
            return
        report = StepReport(
            step=position.step,
            epoch=self.course.epochs_done(position),
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            labelled_tokens=result.labelled_tokens,
            seconds=seconds,
            mfu=self.meter.mfu(
                result.computed_tokens, result.attention_pairs, result.labelled_tokens, seconds
            ),
            memory_bytes=result.memory_bytes,
            rewards=result.rewards,
        )
        self.tracker.after_step(report, time.monotonic())
        if self.recording is None:
            return
        self.recording.after_step(report)
        _LOG.info(
            "step %d/%d  loss %.4f  lr %.3g  grad norm %.3g  %.2f s",
            report.step,
            self.total_steps,
            report.loss,
            rate,
            report.grad_norm,
            seconds,
        )

    def _tell(self, **changes: object) -> None:
        if self.tracker is not None:
            self.tracker.update(**changes)


def seed_step(seed: int, step: int) -> None:
    """Make dropout a function of seed, step and rank, so that a resumed run repeats it exactly."""
    torch.manual_seed(hash((seed, step, dist.get_rank())))


def world_batch(job: TrainJob) -> int:
    """Samples of a global batch; what it counts may be pairs of them."""
    counted = job.training.micro_batch_size * job.training.gradient_accumulation_steps
    return dist.get_world_size() * counted * job.objective.sequences
