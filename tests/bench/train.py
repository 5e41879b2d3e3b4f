"""`make bench-train`: the trainer against FastChat's, side by side, to build/bench/train.json.

Everything is measured in pairs, the two sides one right after the other, and the medians of their ratios are
told: another process on the machine slows both. On a busy machine, `YUAN2_BENCH_CLOCK=cpu` with `--threads 1`
counts processor time instead of wall time. Preparation is measured by `make bench-prepare`; what it
found last is repeated here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench import (
    train_checkpoints,
    train_memory,
    train_padding,
    train_sharing,
    train_utilisation,
    trainer,
)
from tests.bench.report import FOLDER, Row, write
from yuan2_core.processors import available_cpus

PARTS = ("padding", "utilisation", "memory", "sharing", "checkpoints")


def main() -> None:
    """Measure and write build/bench/train.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each (default %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be repeated")
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="of torch (default %(default)s); on a busy machine one, for threads that wait for one another "
        "wait for every other process, and small products do so more often",
    )
    arguments = parser.parse_args()
    trainer.start(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), arguments.pairs, arguments.only or PARTS)
    write("train", [*_prepared(), *rows])


def measure(root: Path, pairs: int, parts: Sequence[str]) -> list[Row]:
    """The chosen parts, each told of when it is done."""
    measures: dict[str, Callable[[], list[Row]]] = {
        "padding": lambda: train_padding.measure(root, pairs),
        "utilisation": lambda: train_utilisation.measure(root, pairs),
        "memory": train_memory.measure,
        "sharing": lambda: train_sharing.measure(root / "sharing", pairs),
        "checkpoints": lambda: train_checkpoints.measure(root / "checkpoints", pairs),
    }
    rows: list[Row] = []
    for part in PARTS:
        if part in parts:
            found = measures[part]()
            rows += found
            print(*found, sep="\n", file=sys.stderr, flush=True)
    return rows


def _prepared() -> list[Row]:
    """Rows of the last `make bench-prepare`."""
    path = FOLDER / "prepare.json"
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


if __name__ == "__main__":
    main()
