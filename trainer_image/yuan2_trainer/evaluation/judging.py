"""The evaluations of a run: when they are due, what they found, and what follows from it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yuan2_core.contract import TrainJob
from yuan2_core.sections import Evaluation
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.checkpoint.checkpoints import Checkpoints
from yuan2_trainer.checkpoint.restoring import put_weights
from yuan2_trainer.data.holdout import evaluation_samples
from yuan2_trainer.data.order import Course, Position
from yuan2_trainer.evaluation.measuring import Evaluator, Pulse
from yuan2_trainer.evaluation.samples import SAMPLES, SampleAnswers, choose_questions, sample_answers
from yuan2_trainer.evaluation.standing import Standing, is_due
from yuan2_trainer.pod.outcome import PreemptedError
from yuan2_trainer.pod.stopping import AskedToEndError, Vote
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.progress import EvaluationReport, Tracker
from yuan2_trainer.reporting.step_log import Recording
from yuan2_trainer.train.step import Stepper

_LOG = logging.getLogger(__name__)


@dataclass
class Judge:
    """Evaluates a run, keeps its standing, and picks the weights that it exports."""

    wanted: Evaluation
    evaluator: Evaluator
    course: Course
    pulse: Pulse
    standing: Standing
    answers: SampleAnswers | None = None
    recording: Recording | None = None
    """Of rank 0."""

    def attach(self, tracker: Tracker | None, recording: Recording | None) -> None:
        """Name whom to tell."""
        self.pulse.tracker, self.recording = tracker, recording
        self._tell(eval_loss=self.standing.loss, best_step=self.standing.best_step)

    def pending(self, position: Position, total_steps: int) -> bool:
        """Whether an evaluation is due here that was not made yet."""
        due = is_due(position, self.course, self.wanted.every_steps, total_steps)
        return due and self.standing.waits_for(position.step)

    def leads(self, position: Position) -> bool:
        """Whether the weights of this very step are the best ones so far."""
        return position.step > 0 and self.standing.best_step == position.step

    @property
    def exhausted(self) -> bool:
        """Whether training ends before its last step."""
        return self.standing.exhausts(self.wanted.early_stopping_patience)

    def evaluate(self, position: Position) -> None:
        """Evaluate, and tell whoever wants to know.

        Raises:
            AskedToEndError: nothing has changed; the evaluation is still pending.
        """
        began = time.monotonic()
        with self._evaluating():
            loss, rewards = self.evaluator.measure(self.pulse)
        self.standing = self.standing.after(position.step, loss)
        self._tell(eval_loss=self.standing.loss, best_step=self.standing.best_step)
        if self.recording is None:
            return
        epoch = self.course.epochs_done(position)
        report = EvaluationReport(position.step, epoch, loss, perplexity(loss), rewards)
        self.recording.after_evaluation(report)
        _LOG.info(
            "step %d  evaluation loss %.4f  perplexity %.4g  %.2f s",
            position.step,
            loss,
            report.perplexity,
            time.monotonic() - began,
        )

    def answer_before(self) -> None:
        """Let the model answer before the first step.

        Raises:
            PreemptedError: the pod was asked to end.
        """
        try:
            if self.answers is not None:
                with self._evaluating():
                    self.answers.write(0)
        except AskedToEndError as error:
            raise preempted_before(0) from error

    def answer_after(self, step: int) -> None:
        """Let the model answer with the weights of a step, which are written already: a pod that is asked to
        end now does without."""
        try:
            if self.answers is not None:
                self.answers.write(step)
        except AskedToEndError:
            _LOG.warning("asked to end: no sample answers of step %d", step)

    def put_best_in_place(self, checkpoints: Checkpoints, last_step: int) -> int:
        """Give the model the weights of the lowest evaluation loss; returns the step that its weights are of.

        They come from the checkpoint that was written then. Where that is damaged, the last weights stay.
        """
        best = self.standing.best_step
        if best is None or best == last_step:
            return last_step
        found = checkpoints.find(best)
        if found is None:
            _LOG.warning(
                "the checkpoint of step %d, the best one, cannot be read: step %d stays", best, last_step
            )
            return last_step
        put_weights(self.evaluator.stepper.engine.module, found)
        return best

    def words(self, step: int, total_steps: int, exported_step: int) -> str:
        """How the run ended and whose step's weights it left; where those are may follow."""
        found = self.standing
        said = f"{step} steps done"
        if step < total_steps:
            said = (
                f"stopped early at step {step} of {total_steps}, after {found.worse} evaluations without a "
                "lower loss"
            )
        if found.best_loss is not None:
            said += f"; the evaluation loss was lowest at step {found.best_step}: {found.best_loss:.4f}"
        return f"{said}; weights of step {exported_step}"

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._tell(state="evaluating")
        try:
            yield
        finally:
            self._tell(state="training")

    def _tell(self, **changes: object) -> None:
        if self.pulse.tracker is not None:
            self.pulse.tracker.update(**changes)


def build_judge(
    job: TrainJob, workspace: Workspace, stepper: Stepper, course: Course, standing: Standing | None
) -> Judge | None:
    """The judge of a run that holds data out; `None` for one that does not.

    Args:
        job: says what is evaluated, and how often.
        workspace: where the prepared data are.
        stepper: of training.
        course: of training.
        standing: that of the checkpoint which the run goes on from.
    """
    held_out = evaluation_samples(workspace)
    if held_out is None:
        return None
    pulse = Pulse(stepper.vote or Vote(workspace.stop.exists))
    wanted = job.evaluation
    answers = None
    asked = sample_answers(job)
    if asked:
        answers = SampleAnswers(
            engine=stepper.engine,
            questions=choose_questions(held_out, asked, job.objective.sequences),
            tokenizer=Yuan2Tokenizer.from_pretrained(job.model.path),
            pulse=pulse,
            at_once=job.training.micro_batch_size,
            limit=stepper.engine.module.config.max_position_embeddings,
            path=Path(job.output) / SAMPLES,
        )
    return Judge(wanted, Evaluator(stepper, held_out), course, pulse, standing or Standing(), answers)


def preempted_before(step: int) -> PreemptedError:
    """For a pod that was asked to end before this attempt had done anything to save."""
    way_on = f"the next attempt goes on from step {step}" if step else "the next attempt begins anew"
    return PreemptedError(f"asked to end before step {step + 1}; {way_on}")


def perplexity(loss: float) -> float:
    """Exponential of a mean loss in nats; infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
