"""Time lost to a checkpoint every 50 steps.

What one checkpoint takes is measured on runs of a few short steps, with and without one in them, in turns; it
is set against 50 steps of `BATCH` samples. Beside it, the same with training waiting for the file, as it does
where memory leaves no room for a copy. What a real run loses depends on its step, its disks and its ranks,
which share the writing: here stand the bytes and the seconds of what was measured.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.bench.report import Row, at_most, plain
from tests.bench.texts import Texts, in_fastchats_format, templated, write_records
from tests.bench.trainer import RATE, Epoch, Sizes, model_of, prepared, seconds, stepper_of
from yuan2_trainer.checkpoint.checkpoints import Checkpoints
from yuan2_trainer.checkpoint.restoring import start_optimizer
from yuan2_trainer.data.order import Position

SIZES = Sizes(hidden=512, layers=4)
LENGTH = 1024
BATCH = 8
SHORT, STEPS = 2, 4
"""Samples of a step and steps of a run in which the time of a checkpoint is looked for: the file of
252 MB is written before they are over."""
EVERY = 50


def measure(root: Path, given: Texts, pairs: int, sizes: Sizes = SIZES) -> list[Row]:
    """Lost time in percent."""
    root.mkdir()
    records = in_fastchats_format(templated(given.alpaca))
    data = prepared(write_records(root / "alpaca.json", records), given.model, root / "store", LENGTH)
    stepper = stepper_of(model_of(sizes), data, root, LENGTH)
    start_optimizer(stepper.engine)
    epoch = Epoch(stepper, BATCH)
    short = epoch.batch()[:SHORT]  # always the same: its steps take the same time
    checkpoints = Checkpoints(root / "checkpoints", 1, lambda _: None)

    def run(saving: bool, overlap: bool = True) -> None:
        for number in range(STEPS):
            stepper.run(short, RATE)
            if saving and number == 0:
                facts = {"total_steps": 1, "stage": 2, "identity": {}}
                checkpoints.save(stepper.engine, Position(step=1), facts, overlap)
        checkpoints.finish()

    run(saving=True)
    lost: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2 * pairs):
        for overlap, found in lost.items():
            without = seconds(lambda: run(saving=False))
            found.append(seconds(lambda o=overlap: run(saving=True, overlap=o)) - without)
    step = statistics.median(seconds(epoch.step) for _ in range(pairs))
    what = f"{sizes}, length {LENGTH:,}, {_size(root / 'checkpoints') / 1e6:.0f} MB"
    return _rows(what, step, *map(statistics.median, lost.values()))


def _rows(what: str, step: float, beside: float, waiting: float) -> list[Row]:
    share = 100 * beside / (EVERY * step)
    return [
        plain("a checkpoint, written beside the training", beside, "s", what),
        plain("a checkpoint, training waiting for the file", waiting, "s", what),
        plain(f"a step of {BATCH} samples", step, "s", what),
        at_most(plain(f"time lost to a checkpoint every {EVERY} steps", share, "%", what), 3),
    ]


def _size(root: Path) -> int:
    return sum(item.stat().st_size for item in root.rglob("*") if item.is_file())
