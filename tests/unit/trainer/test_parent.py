"""A process that was started for another one ends with it, however early that one dies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from yuan2_trainer.pod.parent import PARENT

PROGRAM = "from yuan2_trainer.pod.parent import die_with_parent; die_with_parent(); print('works on')"


def run(parent: int | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    if parent is not None:
        environment[PARENT] = str(parent)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("parent", [None, os.getpid()], ids=["unknown", "alive"])
def test_a_process_works_on_as_long_as_its_parent_lives(parent: int | None) -> None:
    found = run(parent)
    assert (found.returncode, found.stdout) == (0, "works on\n"), found.stderr


def test_a_process_whose_parent_died_before_it_could_ask_ends_at_once() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    found = run(dead.pid)
    assert (found.returncode, found.stdout) == (1, "")
