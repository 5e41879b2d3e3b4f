"""A running pod from outside: what it publishes, and the processes below its main one."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from tests.support.training import Pod
from yuan2_core.contract import TrainJob


def ask(job: TrainJob, path: str, port: int | None = None) -> str:
    """What the pod answers on its port for progress, or on another one.

    Raises:
        OSError: nobody answers.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{port or job.progress_port}{path}", timeout=5) as answer:
        return answer.read().decode()


def family(pid: int) -> list[int]:
    """A process and all below it that live now, parents first."""
    found = [pid]
    for member in found:
        found += children(member)
    return found


def children(pid: int) -> list[int]:
    """Processes that a process has started, of any of its threads."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return []


def ranks(pod: Pod) -> list[int]:
    """Process ids of a pod's ranks; none as long as torchrun has started none."""
    return [pid for pid in family(pod.process.pid) if b"yuan2_trainer.rank" in command_of(pid)]


def command_of(pid: int) -> bytes:
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pids: list[int]) -> None:
    """SIGKILL to each that still lives."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pids: list[int], seconds: float = 60) -> None:
    """Wait for processes that must end by themselves.

    Raises:
        TimeoutError: one still runs.
    """
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if command_of(pid)]:
        if time.monotonic() > end:
            raise TimeoutError(f"still running: {[command_of(pid) for pid in left]}")
        time.sleep(0.02)
