"""One training process, started by torchrun: `python -m yuan2_trainer.rank WORKSPACE`."""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuan2_core.contract import TrainJob
from yuan2_trainer.data.prepare import Prepared, discard_cache
from yuan2_trainer.model.deepspeed import prepare_environment, without_shared_memory_op
from yuan2_trainer.pod.ending import leave, settle
from yuan2_trainer.pod.host_memory import keep_freed_memory, return_freed_memory
from yuan2_trainer.pod.logs import configure_logging
from yuan2_trainer.pod.outcome import JobError, PreemptedError
from yuan2_trainer.pod.parent import die_with_parent
from yuan2_trainer.pod.stacks import write_on_signal
from yuan2_trainer.pod.workspace import Workspace, read_text, replace

if TYPE_CHECKING:
    from yuan2_trainer.data.order import Position
    from yuan2_trainer.train.loop import Loop
    from yuan2_trainer.train.step import Stepper

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Longer than rank 0 takes to export a model; a rank that died is noticed by its closed connection, not by
this."""
_POLL_SECONDS = 0.02
_LOG = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Train, and leave word of how it ended in the workspace. Never returns to the interpreter's own
    shutdown."""
    die_with_parent()
    workspace = Workspace(Path(arguments[0]))
    rank = int(os.environ["RANK"])
    configure_logging(f"rank {rank}")
    write_on_signal(workspace, rank)
    outcome = settle(lambda: train(workspace))
    replace(workspace.outcome(rank), outcome.to_json())
    leave(outcome)


def train(workspace: Workspace) -> str:
    """The whole life of a rank; returns the sentence that a completed run ends with."""
    job = TrainJob.model_validate_json(workspace.job.read_bytes())
    prepare_environment(job.launch.device)
    start_process_group(job.launch.device, job.training.tf32)
    if job.launch.device == "cpu":
        require_collectives(job)
    prepared = _wait_until_prepared(workspace)

    import torch.distributed as dist

    from yuan2_trainer.reporting.run_record import completed_step, make_record, write_record
    from yuan2_trainer.train.identity import differences, run_identity
    from yuan2_trainer.train.reference import refer

    identity = run_identity(job, prepared)
    done = completed_step(job, lambda before: not differences(before, identity))
    if done is not None:
        return f"{job.output} holds the result of this very run already: {done} steps"
    loop, position = build_loop(job, workspace, prepared, identity)
    record = make_record(job, identity, prepared)
    if loop.recording is not None:
        write_record(job, record, position.step, complete=False)
    judge = loop.judge
    try:
        refer(job, loop, identity, position.step)
        if judge is not None and position.step == 0:
            judge.answer_before()
        position = loop.run(position)
    finally:
        if loop.recording is not None:
            loop.recording.close()
    if loop.tracker is not None:
        loop.tracker.update(state="exporting")
    step = position.step if judge is None else judge.put_best_in_place(loop.checkpoints, position.step)
    exported = _export(job, loop, workspace, step)
    if judge is not None:
        judge.answer_after(step)
    if loop.recording is not None:
        loop.recording.draw()
        write_record(job, record, position.step, complete=True, exported_step=step)
    if loop.tracker is not None:
        loop.tracker.update(state="complete")
    dist.barrier()
    if dist.get_rank() == 0:
        discard_cache(job.output)
    if judge is not None:
        return f"{judge.words(position.step, loop.total_steps, step)} {exported}"
    return f"{position.step} steps done; {exported}"


def _export(job: TrainJob, loop: Loop, workspace: Workspace, step: int) -> str:
    """Export the weights of a step, which are in place; returns words on where to."""
    from yuan2_trainer.checkpoint.export import Export
    from yuan2_trainer.evaluation.measuring import Pulse
    from yuan2_trainer.pod.stopping import AskedToEndError, Vote

    loop.checkpoints.release()
    return_freed_memory()
    pulse = Pulse(loop.stepper.vote or Vote(workspace.stop.exists), loop.tracker)
    try:
        return Export(job, loop.stepper.engine, loop.checkpoints.digest(step), pulse.beat).write()
    except AskedToEndError as error:
        raise PreemptedError("asked to end during the export; the next attempt goes on with it") from error


def start_process_group(device: str, tf32: bool) -> None:
    """Join the other ranks: gloo on `cpu`, NCCL on `cuda`, there with or without TF32 for fp32 matrices."""
    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise JobError(
                "launch.device is cuda, but the pod sees no GPU; set workers.gpusPerWorker and use a GPU node"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    else:
        keep_freed_memory()
        without_shared_memory_op()
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)


def require_collectives(job: TrainJob) -> None:
    """Try what the job will ask of gloo, which learned bf16 and whole-tensor gathering after torch 2.1.

    Raises:
        JobError: this one has not.
    """
    import torch
    import torch.distributed as dist

    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    one = torch.zeros(1, dtype=dtype)
    try:
        dist.all_reduce(one)
        if job.stage == 3 or (job.stage == 2 and dist.get_world_size() > 1):
            dist.all_gather_into_tensor(one.new_zeros(dist.get_world_size()), one)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("scalar type", "no support for")):
            raise
        raise JobError(
            f"training.precision {job.training.precision} with deepspeed.stage {job.stage}: torch "
            f"{torch.__version__} cannot do that on CPUs ({error}); use fp32 and stage 0, or an image "
            "with a newer torch"
        ) from error


def build_loop(
    job: TrainJob, workspace: Workspace, prepared: Prepared, identity: dict[str, Any]
) -> tuple[Loop, Position]:
    """Model, optimizer, data and position, from the newest checkpoint or from the beginning."""
    import torch
    import torch.distributed as dist

    from yuan2_model.dimensions import read_dimensions
    from yuan2_trainer.checkpoint.checkpoints import Checkpoints
    from yuan2_trainer.data.holdout import training_samples
    from yuan2_trainer.data.order import Course, Position
    from yuan2_trainer.evaluation.judging import build_judge
    from yuan2_trainer.pod.lease import require_lease
    from yuan2_trainer.reporting.mfu import Meter
    from yuan2_trainer.reporting.step_log import Recording
    from yuan2_trainer.train.engine import load_engine
    from yuan2_trainer.train.loop import Loop, world_batch

    output = Path(job.output)
    checkpoints = Checkpoints(
        output / "checkpoints", job.checkpoint.keep, _LOG.warning, lambda: require_lease(job)
    )
    found = checkpoints.latest()
    if found is not None:
        _refuse_another_run(found.manifest.identity, identity, found.directory)
    position = Position() if found is None else found.manifest.position
    course = Course.of(job.training, prepared.samples, world_batch(job), job.objective.sequences)
    total = course.total_steps(position)
    torch.manual_seed(job.training.seed)
    engine = load_engine(job, found)
    stepper = _stepper(job, workspace, prepared, engine)
    last_checkpoint = None if found is None else position.step
    meter = Meter.of(job, read_dimensions(engine.module.config.to_dict()))
    loop = Loop(job, workspace, stepper, course, checkpoints, identity, total, last_checkpoint, meter)
    loop.samples = training_samples(workspace)
    standing = None if found is None else found.manifest.standing
    loop.judge = build_judge(job, workspace, stepper, course, standing)
    if dist.get_rank() == 0:
        evaluated = None if standing is None else standing.evaluated_step
        loop.recording = Recording(job, position.step, evaluated)
    if os.environ["LOCAL_RANK"] == "0":
        loop.tracker = _tracker(workspace, prepared, position, total, found is not None)
    if loop.judge is not None:
        loop.judge.attach(loop.tracker, loop.recording)
    if found is not None:
        _LOG.info("going on from %s, step %d of %d", found.directory.name, position.step, total)
    return loop, position


def _stepper(job: TrainJob, workspace: Workspace, prepared: Prepared, engine: Any) -> Stepper:
    """What takes batches through the engine: of answers, or of comparisons between them."""
    from yuan2_core.sections import SFT
    from yuan2_trainer.data.store import SampleStore
    from yuan2_trainer.pod.stopping import Vote
    from yuan2_trainer.train.preferences import PreferenceStepper
    from yuan2_trainer.train.step import Stepper

    fields: dict[str, Any] = {
        "engine": engine,
        "store": SampleStore.open(workspace.samples),
        "device": engine.device,
        "micro_batch_size": job.training.micro_batch_size,
        "accumulation_steps": job.training.gradient_accumulation_steps,
        "pad_id": prepared.pad_id,
        "max_length": job.training.max_length * job.objective.sequences,
        "max_grad_norm": job.training.max_grad_norm,
        "packing": job.training.packing,
        "vote": Vote(workspace.stop.exists),
    }
    settings = job.objective.settings
    if isinstance(settings, SFT):
        return Stepper(**fields)
    return PreferenceStepper(**fields, settings=settings)


def _tracker(workspace: Workspace, prepared: Prepared, position: Position, total: int, resumed: bool) -> Any:
    from yuan2_trainer.reporting.progress import Tracker

    tracker = Tracker(workspace)
    tracker.update(
        state="training",
        step=position.step,
        total_steps=total,
        samples=prepared.samples,
        tokens=prepared.tokens,
        dropped_samples=prepared.dropped_samples,
        resumed_from_step=position.step if resumed else None,
        last_checkpoint_step=position.step if resumed else None,
        last_step_at=time.monotonic(),
    )
    return tracker


def _refuse_another_run(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    from yuan2_trainer.train.identity import differences, names_its_base

    changed = differences(before, now)
    if changed:
        raise JobError(
            f"output: {directory.parent} holds checkpoints of another run: {'; '.join(changed)}; "
            "give another output path, or delete that directory to begin anew"
        )
    if not names_its_base(before):
        _LOG.warning(
            "the checkpoints of an earlier release do not say which base model they were trained from: "
            "that of model.source is taken for it"
        )


def _wait_until_prepared(workspace: Workspace) -> Prepared:
    """Wait for the launcher, which ends this process if the data turn out to be unusable."""
    while (text := read_text(workspace.prepared)) is None:
        time.sleep(_POLL_SECONDS)
    return Prepared.model_validate_json(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
