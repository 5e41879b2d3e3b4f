"""The table at the end of `make test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "scripts" / "durations.py"
TESTS = """
import time, pytest
@pytest.fixture
def slow(): time.sleep(0.2)
def test_that_waits_for_its_fixture(slow): ...
def test_that_is_quick(): ...
"""


def test_stages_and_slowest_tests_are_listed_with_their_set_up(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "stages.tsv").write_text("lint\tok\t20\nunit\tFAILED\t31\n")
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={tmp_path}/unit.xml",
    ]
    subprocess.run([*pytest, "--rootdir", tmp_path, "tests"], cwd=tmp_path, check=True, capture_output=True)
    found = subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, capture_output=True, text=True)
    words = [line.split() for line in found.stdout.splitlines()]
    assert words[:3] == [
        ["stage", "result", "seconds", "tests"],
        ["lint", "ok", "20"],
        ["unit", "FAILED", "31", "2"],
    ]
    assert words[4] == ["the", "2", "slowest", "of", "2", "tests"]
    assert [line[-1] for line in words[5:]] == [
        "tests/test_it::test_that_waits_for_its_fixture",
        "tests/test_it::test_that_is_quick",
    ]
    assert float(words[5][0]) >= 0.2
