"""Rows of a benchmark: printed for a reader, and written to build/bench/NAME.json for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench"


@dataclass(frozen=True)
class Row:
    """One number of a benchmark.

    Attributes:
        row: what was measured.
        value: the number, in `unit`.
        goal: what it should be, such as `<= 20`; None where the number is only reported.
        met: whether it is; None without a goal.
    """

    row: str
    value: float
    unit: str
    goal: str | None = None
    met: bool | None = None


def at_most(row: str, value: float, unit: str, limit: float) -> Row:
    """A number that should not be above `limit`."""
    return Row(row, round(value, 4), unit, f"<= {limit:g}", value <= limit)


def at_least(row: str, value: float, unit: str, limit: float) -> Row:
    """A number that should not be below `limit`."""
    return Row(row, round(value, 4), unit, f">= {limit:g}", value >= limit)


def plain(row: str, value: float, unit: str) -> Row:
    """A number without a goal."""
    return Row(row, round(value, 4), unit)


def write(name: str, rows: Sequence[Row]) -> None:
    """Print the rows and write build/bench/NAME.json."""
    width = max(len(row.row) for row in rows)
    for row in rows:
        verdict = "" if row.met is None else f"  goal {row.goal}: {'met' if row.met else 'MISSED'}"
        print(f"{row.row:<{width}}  {row.value:>10,.4g} {row.unit:<9}{verdict}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
