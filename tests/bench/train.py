"""`make bench-train`: the trainer against FastChat's, side by side, to build/bench/train.json.

Everything is measured in pairs, the two sides one right after the other, and the medians of their ratios are
told: another process on the machine slows both. On a busy machine, `YUAN2_BENCH_CLOCK=cpu` with `--threads 1`
counts processor time instead of wall time (but in FastChat's tokenisation, a process of its own).
"""

from __future__ import annotations

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
from tests.bench.report import Report, Row, options, table
from tests.bench.texts import Texts, texts
from yuan2_core.processors import available_cpus

Measures = dict[str, Callable[[], list[Row]]]
PARTS = ("padding", "utilisation", "memory", "sharing", "checkpoints")


def main() -> None:
    """Measure and write build/bench/train.json."""
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each (default %(default)s)")
    parser.add_argument(
        "--pairs-1024", type=int, default=8, help="of length 1,024, which is close to its goal (%(default)s)"
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be repeated")
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="of torch (default %(default)s); on a busy machine one, for threads that wait for one another "
        "wait for every other process, and small products do so more often",
    )
    arguments = parser.parse_args()
    report = Report("train", arguments)
    trainer.start(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        root, parts = Path(name), arguments.only or PARTS
        given = texts(root)
        if arguments.small:
            rows = measure(small(root, given.few(64)), parts)
        else:
            rows = measure(full(root, given, arguments.pairs, arguments.pairs_1024), parts)
    report.write(rows)


def full(root: Path, given: Texts, pairs: int, pairs_1024: int) -> Measures:
    """What is published."""
    wanted = train_padding.lengths(pairs, pairs_1024)
    return {
        "padding": lambda: train_padding.measure(root, given, pairs, wanted),
        "utilisation": lambda: train_utilisation.measure(root / "utilisation", given, pairs),
        "memory": train_memory.measure,
        "sharing": lambda: train_sharing.measure(root / "sharing", given, pairs),
        "checkpoints": lambda: train_checkpoints.measure(root / "checkpoints", given, pairs),
    }


def small(root: Path, given: Texts) -> Measures:
    """The same on next to nothing, in seconds, to see that it runs."""
    sizes = trainer.Sizes(hidden=64, layers=1)
    wanted = (train_padding.Length(128, 5.0, 1),)
    case = train_utilisation.Case(sizes, 4)
    return {
        "padding": lambda: train_padding.measure(root, given, 1, wanted, sizes),
        "utilisation": lambda: train_utilisation.measure(root / "utilisation", given, 1, (case,)),
        "memory": lambda: train_memory.measure(64, 4096, (64,)),
        "sharing": lambda: train_sharing.measure(root / "sharing", given, 1, sizes, batch=4),
        "checkpoints": lambda: train_checkpoints.measure(root / "checkpoints", given, 1, sizes),
    }


def measure(measures: Measures, parts: Sequence[str]) -> list[Row]:
    """The chosen parts, each told of when it is done."""
    rows: list[Row] = []
    for part in PARTS:
        if part in parts:
            found = measures[part]()
            rows += found
            print(*table(found), sep="\n", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
