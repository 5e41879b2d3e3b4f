"""In CI nothing is skipped but what needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TESTS = """
import pytest

@pytest.fixture
def nothing():
    pytest.skip("nothing there")

@pytest.mark.skip(reason="a mark")
def test_mark(): ...
def test_body(): pytest.importorskip("no_such_module")
def test_fixture(nothing): ...
@pytest.mark.parametrize("x", [])
def test_empty(x): ...
@pytest.mark.gpu
@pytest.mark.skipif(True, reason="needs a GPU")
def test_gpu(): ...
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_passes(): ...
"""


def outcome(directory: Path, **environment: str) -> str:
    """The last line of pytest over the files of a directory."""
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.support.skips", "-p", "no:cacheprovider", directory],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
        cwd=directory,
        text=True,
        capture_output=True,
    )
    return found.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "1 passed, 5 skipped, 1 xfailed"),
        ({"CI": "true"}, "1 failed, 1 passed, 1 skipped, 1 xfailed, 3 errors"),
    ],
)
def test_a_skip_fails_in_ci_unless_it_needs_a_gpu(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    assert f" {expected} in " in outcome(tmp_path, **environment)


@pytest.mark.parametrize(("environment", "expected"), [({}, "1 skipped"), ({"CI": "true"}, "1 error")])
def test_a_file_that_skips_itself_fails_in_ci(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    assert f" {expected} in " in outcome(tmp_path, **environment)
