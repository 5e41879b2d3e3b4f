"""Rows of a benchmark: printed as a table of docs/benchmarks.md, and written to build/bench/NAME.json.

All rows of a report come from one run on one machine, which it names.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.bench.machine import Machine, this_machine

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"
COLUMNS = ("what", "against", "sizes", "ours", "theirs", "ratio", "goal", "met")


@dataclass(frozen=True)
class Row:
    """One number of a benchmark.

    Attributes:
        row: what was measured.
        value: the number that the goal is about, in `unit`; "x" is ours against theirs.
        against: what it is compared with.
        sizes: of what.
        ours: absolute figure of ours, in `of`; None where nothing is compared.
        theirs: that of the other side.
        of: unit of both.
        least: lowest of the pairs that `value` is the median of; None where there were no pairs.
        most: highest of them.
        pairs: how many.
        goal: what the number should be, such as `<= 20`; None where it is only reported.
        met: whether it is; None without a goal.
    """

    row: str
    value: float
    unit: str
    against: str = ""
    sizes: str = ""
    ours: float | None = None
    theirs: float | None = None
    of: str = ""
    least: float | None = None
    most: float | None = None
    pairs: int | None = None
    goal: str | None = None
    met: bool | None = None


def plain(row: str, value: float, unit: str, sizes: str = "") -> Row:
    """A number without a goal."""
    return Row(row, round(value, 4), unit, sizes=sizes)


def at_most(row: Row, limit: float) -> Row:
    """The same, which should not be above `limit`."""
    return replace(row, goal=f"<= {limit:g}", met=row.value <= limit)


def at_least(row: Row, limit: float) -> Row:
    """The same, which should not be below `limit`."""
    return replace(row, goal=f">= {limit:g}", met=row.value >= limit)


def compared(row: str, against: str, sizes: str, sides: Sequence[tuple[float, float]], of: str) -> Row:
    """Pairs of `(ours, theirs)`, measured side by side, each side's rate or amount in `of`.

    Told are the medians of both sides, and median, lowest and highest of the pairs' ratios: what is measured
    side by side meets the same moments of the machine.
    """
    ratios = sorted(ours / theirs for ours, theirs in sides)
    ours, theirs = (statistics.median(side) for side in zip(*sides, strict=True))
    return Row(
        row,
        round(statistics.median(ratios), 4),
        "x",
        against,
        sizes,
        ours=round(ours, 4),
        theirs=round(theirs, 4),
        of=of,
        least=round(ratios[0], 4),
        most=round(ratios[-1], 4),
        pairs=len(ratios),
    )


def options(description: str | None, small: bool = True) -> argparse.ArgumentParser:
    """What every benchmark can be told; `small` where it can be made so."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the report (default build/bench)")
    if small:
        text = "seconds instead of minutes: shows that it runs, and no figures"
        parser.add_argument("--small", action="store_true", help=text)
    return parser


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent are not above (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * int(percent) // 100) - 1)]


class Report:
    """Begins before the measurement, so that the machine's load is that of others."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.small: bool = getattr(arguments, "small", False)
        self.name = f"{name}-small" if self.small else name
        self.folder: Path = arguments.folder
        self.machine: Machine = this_machine(getattr(arguments, "threads", None))

    def write(self, rows: Sequence[Row]) -> Path:
        """Print machine and table, and write both to NAME.json; what is small is held to no goal."""
        if self.small:
            rows = [replace(row, goal=None, met=None) for row in rows]
        print(f"{self.name}: {self.machine}\n", *table(rows), sep="\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        content = {"machine": asdict(self.machine), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
    return ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines]


def _cells(row: Row) -> tuple[str, ...]:
    compares = row.ours is not None and row.theirs is not None
    ours = amount(row.ours, row.of) if compares else amount(row.value, row.unit)
    theirs = amount(row.theirs, row.of) if compares else ""
    several = row.pairs is not None and row.pairs > 1
    spread = f" ({amount(row.least)} to {amount(row.most)}, {row.pairs} pairs)" if several else ""
    ratio = amount(row.value, row.unit) + spread if compares else ""
    goal = "" if row.goal is None else row.goal.replace("<=", "≤").replace(">=", "≥") + _unit(row.unit)
    met = "" if row.met is None else "met" if row.met else "**missed**"
    return row.row, row.against, row.sizes, ours, theirs, ratio, goal, met


def amount(value: float | None, unit: str = "") -> str:
    """A number with three digits that count, or all before the point, and its unit."""
    if value is None:
        return ""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}".removesuffix(".00") + _unit(unit)


def _unit(unit: str) -> str:
    return {"": "", "x": "×", "%": "%"}.get(unit, f" {unit}")
