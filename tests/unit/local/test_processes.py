"""Processes are ended by pid, start time and boot, never by pid alone."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from yuan2_local.errors import ClusterError
from yuan2_local.paths import State
from yuan2_local.processes import Processes, Record, alive, boot_id, stat_fields

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-uc",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)",
]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(State(tmp_path))
    yield made
    made.kill_all()


def test_stat_fields_survive_a_name_with_spaces_and_brackets() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    assert stat_fields(f"77 (tmux: (server) x) S {fields}") == ("S", 22)


def test_we_are_alive_and_not_with_another_start_time() -> None:
    _, ticks = stat_fields(Path("/proc/self/stat").read_text())
    record = Record("self", os.getpid(), ticks, boot_id(), ())
    assert alive(record)
    assert not alive(dataclasses.replace(record, start_ticks=ticks + 1))
    assert not alive(dataclasses.replace(record, boot_id="another boot"))


def test_a_started_process_is_started_once(processes: Processes) -> None:
    assert processes.ensure("sleep", SLEEP)
    assert not processes.ensure("sleep", SLEEP)
    assert processes.running() == {"sleep"}


def test_a_dead_process_is_started_again(processes: Processes) -> None:
    processes.ensure("sleep", SLEEP)
    first = processes.records()["sleep"].pid
    processes.stop("sleep")
    assert processes.ensure("sleep", SLEEP)
    assert processes.records()["sleep"].pid != first


def test_another_process_with_the_recorded_pid_is_left_alone(processes: Processes, tmp_path: Path) -> None:
    processes.ensure("sleep", SLEEP)
    record = processes.records()["sleep"]
    path = State(tmp_path).processes / "sleep.json"
    text = path.read_text()
    path.write_text(
        text.replace(f'"start_ticks": {record.start_ticks}', f'"start_ticks": {record.start_ticks - 1}')
    )
    processes.stop("sleep")
    assert alive(record)
    path.write_text(text)


def test_a_deaf_process_is_killed(processes: Processes) -> None:
    processes.ensure("deaf", STUBBORN)
    while "deaf" not in processes.log("deaf").read_text():
        time.sleep(0.01)
    record = processes.records()["deaf"]
    processes.stop("deaf", seconds=0.1)
    assert not alive(record)
    assert processes.records() == {}


def test_the_check_of_a_dead_process_tells_the_end_of_its_log(processes: Processes) -> None:
    processes.ensure("broken", [sys.executable, "-c", "raise SystemExit('no such flag')"])
    while processes.running():
        time.sleep(0.01)
    with pytest.raises(ClusterError, match="no such flag"):
        processes.check(["broken"])
