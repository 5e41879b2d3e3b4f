"""Room that a run will take on its output volume, known before the training. No torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from yuan2_core.contract import TrainJob
from yuan2_model.dimensions import Dimensions
from yuan2_trainer.checkpoint.manifest import BYTES_PER_PARAMETER, candidates
from yuan2_trainer.data.order import Course, Position
from yuan2_trainer.model.methods import trainable_parameters
from yuan2_trainer.pod.outcome import OutputFullError

BYTES_OF_WEIGHT = {"bf16": 2, "fp32": 4}
EXPORT_ROOM = 1.05
"""Room for config, tokenizer and metrics beside the weights."""


@dataclass(frozen=True)
class Room:
    """Bytes that a run still has to write, beside what it deletes again."""

    checkpoints: int
    """How many there are at most at a time."""
    checkpoint: float
    """One of them."""
    there: float
    """What earlier attempts left, whose place the same checkpoints take."""
    export: float
    """Adapter and model."""
    data: float
    """Prepared data that are not there yet."""

    @property
    def needed(self) -> float:
        return max(0.0, self.checkpoints * self.checkpoint - self.there) + self.export + self.data

    def __str__(self) -> str:
        count = "a checkpoint" if self.checkpoints == 1 else f"{self.checkpoints} checkpoints"
        parts = [f"{count} of {_gb(self.checkpoint)}", f"the export {_gb(self.export)}"]
        if self.there:
            parts[0] += f" (of them {_gb(self.there)} already there)"
        if self.data:
            parts.append(f"the prepared data {_gb(self.data)}")
        return ", ".join(parts)


def room_before_data(job: TrainJob, dimensions: Dimensions, data: Path) -> Room:
    """What is needed at least: one checkpoint, the export, and prepared data the size of their source."""
    prepared = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    source = sum(_size(path) for path in (job.dataset.path, job.dataset.eval_path) if path is not None)
    return _room(job, dimensions, checkpoints=1, data=max(0, source - prepared))


def room_after_data(job: TrainJob, dimensions: Dimensions, samples: int) -> Room:
    """What the whole run over so many samples needs."""
    return _room(job, dimensions, checkpoints=most_checkpoints(job, samples), data=0)


def most_checkpoints(job: TrainJob, samples: int) -> int:
    """Checkpoints that there are at most at a time: the lasting ones that are kept, the newest of others, and
    the one that is being written; one more where evaluation keeps the best.
    """
    training, launch = job.training, job.launch
    world_size = launch.nodes * launch.processes_per_node
    batch = world_size * training.micro_batch_size * training.gradient_accumulation_steps
    batch *= job.objective.sequences
    course = Course.of(training, samples, batch, job.objective.sequences)
    steps = course.total_steps(Position())
    planned, kept = (steps - 1) // job.checkpoint.every_steps, job.checkpoint.keep
    if job.dataset.eval_path is not None or job.dataset.eval_fraction:
        between = job.evaluation.every_steps or -(-samples // batch)
        planned, kept = planned + steps // between, kept + 1
    return max(1, min(steps, min(planned, kept) + 2))


def check_room(output: Path, room: Room) -> None:
    """Raises:
    OutputFullError: the volume has less than `room`; says of what.
    """
    free = shutil.disk_usage(output).free
    if free < room.needed:
        fewer = ", or lower checkpoint.keep" if room.checkpoints > 1 else ""
        raise OutputFullError(
            f"output: {output} has {_gb(free)} free, the run needs {_gb(room.needed)}: {room}; "
            f"free space, ask for a larger claim{fewer}"
        )


def _room(job: TrainJob, dimensions: Dimensions, checkpoints: int, data: float) -> Room:
    trained = trainable_parameters(job.method, dimensions)
    exported = trained + (dimensions.parameters if job.merge_adapter else 0)
    root = Path(job.output) / "checkpoints"
    there = sum(path.stat().st_size for found in candidates(root) for path in found.iterdir())
    return Room(
        checkpoints=checkpoints,
        checkpoint=trained * BYTES_PER_PARAMETER,
        there=there,
        export=exported * BYTES_OF_WEIGHT[job.training.precision] * EXPORT_ROOM,
        data=data,
    )


def _size(path: str) -> int:
    root = Path(path)
    files = root.rglob("*") if root.is_dir() else [root]
    try:
        return sum(file.stat().st_size for file in files if not file.is_dir())
    except OSError:
        return 0  # the preparation says what is wrong with it


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
