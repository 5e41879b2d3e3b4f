"""The estimate on rows that it was not calibrated on: each is foretold by constants that the others give.

The constants of `yuan2_core.estimate` were chosen with all published rows in sight, so their errors on these
rows say how well they describe, not how well they foretell. Here every calibrated constant is chosen anew,
without the row that is then judged, by one rule: the smallest largest error on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import TypeVar

import pytest

from tests.unit.core.test_estimate import MEASURED, ROWS, published_run
from yuan2_core.estimate import duration, memory
from yuan2_core.estimate.duration import train_seconds
from yuan2_core.estimate.memory import gpu_memory

DOCUMENT = Path(__file__).parents[3] / "docs" / "estimate.md"
RUNS = [published_run(row) for row in MEASURED["rows"]]
INDEX = range(len(RUNS))
METHODS = ("full", "lora", "qlora")
EFFICIENCIES = [number / 100 for number in range(20, 81)]
INTENSITIES = [float(number) for number in range(100, 201, 10)]
RUNTIMES = [(cuda * 1e8, nccl * 1e8) for cuda, nccl in product(range(6, 21, 2), range(0, 21, 2))]
RESERVES = [number / 4 for number in range(9)]
MEMORY_TOLERANCE = 0.35
TIME_TOLERANCE = 0.50
Choice = TypeVar("Choice")
Errors = dict[Choice, list[float]]
"""For each choice of constants the error of every row: estimate / measured - 1."""


def worst(errors: Sequence[float], rows: Iterable[int]) -> tuple[float, float]:
    """The largest error of some rows, either way alike, and their mean to tell choices apart."""
    sizes = [abs(math.log1p(errors[row])) for row in rows]
    return (max(sizes), sum(sizes) / len(sizes)) if sizes else (0.0, 0.0)


@pytest.fixture(scope="module")
def time_errors() -> Errors[tuple[float, float]]:
    with pytest.MonkeyPatch.context() as patch:
        return {choice: _times(patch, *choice) for choice in product(INTENSITIES, EFFICIENCIES)}


def _times(patch: pytest.MonkeyPatch, intensity: float, efficiency: float) -> list[float]:
    patch.setattr(duration, "ATTAINABLE_INTENSITY", intensity)
    patch.setattr(duration, "EFFICIENCY", dict.fromkeys(METHODS, efficiency))
    return [(train_seconds(run) or 0) / 3600 / row.hours - 1 for run, row in zip(RUNS, ROWS, strict=True)]


@pytest.fixture(scope="module")
def memory_errors() -> Errors[tuple[tuple[float, float], float]]:
    with pytest.MonkeyPatch.context() as patch:
        return {choice: _memories(patch, *choice) for choice in product(RUNTIMES, RESERVES)}


def _memories(patch: pytest.MonkeyPatch, runtime: tuple[float, float], reserve: float) -> list[float]:
    patch.setattr(memory, "CUDA_CONTEXT", runtime[0])
    patch.setattr(memory, "NCCL_BUFFERS", runtime[1])
    patch.setattr(memory, "ZERO_3_RESERVE", reserve)
    return [gpu_memory(run).total / 1e9 / row.gigabytes - 1 for run, row in zip(RUNS, ROWS, strict=True)]


def held_out_time(errors: Errors[tuple[float, float]], row: int) -> float:
    """The error of a row under the intensity and the efficiencies that all other rows give."""
    others = {method: [i for i in INDEX if RUNS[i].method == method and i != row] for method in METHODS}

    def efficiency(intensity: float, method: str) -> float:
        return min(EFFICIENCIES, key=lambda value: worst(errors[intensity, value], others[method]))

    def largest(intensity: float) -> tuple[float, float]:
        found = [worst(errors[intensity, efficiency(intensity, m)], others[m]) for m in METHODS]
        return max(size for size, _ in found), sum(mean for _, mean in found)

    chosen = min(INTENSITIES, key=largest)
    return errors[chosen, efficiency(chosen, RUNS[row].method)][row]


def held_out_memory(errors: Errors[tuple[tuple[float, float], float]], row: int) -> float:
    """The error of a row under the runtime and the reserve that all other rows give."""
    others = [i for i in INDEX if i != row]
    return errors[min(errors, key=lambda choice: worst(errors[choice], others))][row]


def test_rows_are_foretold_by_the_others(
    time_errors: Errors[tuple[float, float]], memory_errors: Errors[tuple[tuple[float, float], float]]
) -> None:
    """The table stands in docs/estimate.md."""
    times = [held_out_time(time_errors, row) for row in INDEX]
    memories = [held_out_memory(memory_errors, row) for row in INDEX]
    table = "\n".join(
        [
            "| error | GB, calibrated on | GB, held out | hours, calibrated on | hours, held out |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {of([row.memory_error for row in ROWS]):.0%} | {of(memories):.0%} "
                f"| {of([row.time_error for row in ROWS]):.0%} | {of(times):.0%} |"
                for name, of in (("median", _median), ("largest", _largest))
            ),
        ]
    )
    print(table)
    assert max(map(abs, memories)) <= MEMORY_TOLERANCE
    assert max(map(abs, times)) <= TIME_TOLERANCE
    assert table in DOCUMENT.read_text(encoding="utf-8").replace("\n  |", "\n|")


def _median(errors: list[float]) -> float:
    return median(map(abs, errors))


def _largest(errors: list[float]) -> float:
    return max(map(abs, errors))
