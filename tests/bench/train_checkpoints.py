"""Time lost to a checkpoint every 50 steps.

Runs of a few steps with a checkpoint in them alternate with runs without; what one more checkpoint takes is
set against 50 steps. Beside it, the same with training waiting for the file, as it does where memory leaves
no room for a copy. What a real run loses depends on its step, its disks and its ranks, which share the
writing: here stand the bytes and the seconds of what was measured.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.bench.prepare import inputs
from tests.bench.report import Row, at_most, plain
from tests.bench.trainer import Epoch, model_of, prepared, seconds, stepper_of, write_records
from yuan2_trainer.checkpoint import Checkpoints, start_optimizer
from yuan2_trainer.data.order import Position

HIDDEN, LAYERS, LENGTH = 512, 4, 1024
BATCH = 8
STEPS = 3
"""Of a run: the file of a checkpoint is written before they are over."""
EVERY = 50


def measure(root: Path, pairs: int) -> list[Row]:
    """Lost time in percent."""
    root.mkdir()
    model_directory, records, _ = inputs(root)
    data = prepared(write_records(root / "alpaca.json", records), model_directory, root / "store", LENGTH)
    stepper = stepper_of(model_of(HIDDEN, LAYERS), data, root, LENGTH)
    start_optimizer(stepper.engine)
    batch = Epoch(stepper, BATCH).batch()  # always the same one: its steps take the same time
    checkpoints = Checkpoints(root / "checkpoints", 1, lambda _: None)

    def steps(saving: bool, overlap: bool = True) -> float:
        def run() -> None:
            for number in range(STEPS):
                stepper.run(batch, 1e-5, stop=False)
                if saving and number == 0:
                    facts = {"total_steps": 1, "stage": 2, "identity": {}}
                    checkpoints.save(stepper.engine, Position(step=1), facts, overlap)
            checkpoints.finish()

        return seconds(run)

    steps(saving=True)
    found: dict[str, list[float]] = {"none": [], "beside": [], "waiting": []}
    for _ in range(pairs):
        found["none"].append(steps(saving=False))
        found["beside"].append(steps(saving=True))
        found["none"].append(steps(saving=False))
        found["waiting"].append(steps(saving=True, overlap=False))
    return _rows(found, _size(root / "checkpoints"))


def _rows(found: dict[str, list[float]], size: int) -> list[Row]:
    plain_runs = found["none"]
    step = statistics.median(plain_runs) / STEPS
    lost = {
        name: statistics.median(
            took - (before + after) / 2
            for took, before, after in zip(times, plain_runs, plain_runs[1:] + plain_runs[-1:], strict=False)
        )
        for name, times in (("beside", found["beside"]), ("waiting", found["waiting"]))
    }
    share = {name: 100 * max(0.0, value) / (EVERY * step) for name, value in lost.items()}
    return [
        plain("a step of the run that saves", step, "s"),
        plain("its checkpoint", size / 1e6, "MB"),
        at_most(f"time lost to a checkpoint every {EVERY} steps", share["beside"], "%", 3),
        plain("  the same, training waiting for the file", share["waiting"], "%"),
    ]


def _size(root: Path) -> int:
    return sum(item.stat().st_size for item in root.rglob("*") if item.is_file())
