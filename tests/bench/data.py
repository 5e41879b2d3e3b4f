"""`make bench-data`: as many conversations as BELLE has in several turns, prepared, and read for training.

What is counted is memory of processes that no file stands behind (resident less shared, over the process and
all that it started): the maps of prepared data are page cache, which the kernel takes back when it wants.
The texts are words of 100,000 different ones, English syllables and Chinese, as often as Zipf's law has them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from tests.bench.report import Report, Row, at_most, options, plain
from tests.support.many_conversations import TURNS, varied, write_conversations
from yuan2_core.contract import DatasetLocation
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data.collate import collate
from yuan2_trainer.data.order import epoch_order
from yuan2_trainer.data.packing import cut_batch
from yuan2_trainer.data.prepare import prepare
from yuan2_trainer.data.store import SampleStore

CONVERSATIONS = 800_000
MAX_LENGTH = 2048
BATCH, STEPS = 128, 500
PIECES = 8000
"""Of the tokenizer."""
GOAL = 1500.0
"""Megabytes a node."""


def main() -> None:
    """Measure and write build/bench/data.json; or, with a task, be what is measured."""
    parser = options(__doc__)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, help="default %(default)s")
    parser.add_argument("--task", choices=("prepare", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task == "prepare":
        _prepare(arguments.root)
    elif arguments.task == "read":
        _read(arguments.root)
    else:
        report = Report("data", arguments)
        with tempfile.TemporaryDirectory() as name:
            report.write(measure(Path(name), 500 if arguments.small else arguments.conversations))


def measure(root: Path, count: int) -> list[Row]:
    """Preparation, and reading as one rank does."""
    text = varied()
    train_tokenizer([text(0, 0) for _ in range(2000)], PIECES, root).save_pretrained(root)
    write_conversations(root / "data.jsonl", count, text)
    size = (root / "data.jsonl").stat().st_size / 1e6
    what = f"{count:,} conversations of {TURNS} turns, {size:,.0f} MB"
    prepared, seconds = _watched("prepare", root)
    read, _ = _watched("read", root)
    reading = f"{what}, {STEPS} batches of {BATCH}"
    return [
        at_most(plain("memory of their preparation, all processes", prepared, "MB", what), GOAL),
        plain("time of their preparation", seconds, "s", what),
        plain("rate of their preparation", TURNS * count / seconds, "samples/s", what),
        at_most(plain("memory of a rank's data", read, "MB", reading), GOAL),
    ]


def _watched(task: str, root: Path) -> tuple[float, float]:
    """Highest memory in MB of a task and what it starts, and its seconds."""
    began, highest = time.perf_counter(), 0
    command = [sys.executable, "-m", "tests.bench.data", "--task", task, "--root", str(root)]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            highest = max(highest, _anonymous(psutil.Process(process.pid)))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return highest / 1e6, time.perf_counter() - began


def _anonymous(parent: psutil.Process) -> int:
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total


# No helper of tests.bench.trainer here: it brings torch, whose memory is not that of data.
def _prepare(root: Path) -> None:
    training = Training(max_length=MAX_LENGTH)
    location = DatasetLocation(path=str(root / "data.jsonl"))
    prepare(location, training, Yuan2Tokenizer.from_pretrained(root), root / "store", lambda: None)


def _read(root: Path) -> None:
    store = SampleStore.open(root / "store")
    order = epoch_order(store.conversations, 42, 0)
    for step in range(min(STEPS, len(order) // BATCH)):
        batch = np.asarray(order[step * BATCH : (step + 1) * BATCH])
        for rows in cut_batch(batch, store, 4, MAX_LENGTH, 1, packing=True):
            collate(store, rows, 0, MAX_LENGTH)


if __name__ == "__main__":
    main()
