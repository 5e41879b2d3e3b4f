"""`make mutation`: the rate of a sample comes with its confidence interval."""

from __future__ import annotations

import random
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "mutation.py"


@pytest.fixture(scope="module")
def mutation() -> ModuleType:
    """The script as a module."""
    spec = spec_from_file_location("mutation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = module_from_spec(spec)
    sys.modules["mutation"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def test_a_sample_covers_the_rate_as_often_as_its_interval_says(mutation: ModuleType) -> None:
    """Of 1,000 mutants 880 are noticed; samples of 200 are drawn again and again."""
    noticed, drawn = [True] * 880 + [False] * 120, random.Random(0)
    intervals = [mutation.interval(sum(drawn.sample(noticed, 200)), 200, 1000) for _ in range(2000)]
    covered = sum(low <= 0.88 <= high for low, high in intervals) / len(intervals)
    assert 0.93 < covered < 0.97


def test_when_all_ran_there_is_nothing_to_estimate(mutation: ModuleType) -> None:
    assert mutation.interval(112, 126, 126) == (112 / 126, 112 / 126)


def test_an_unknown_package_is_named() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "plans"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "plans: not one of conversation, packing" in done.stderr
