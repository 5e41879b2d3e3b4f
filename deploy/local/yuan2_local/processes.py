"""Long-running processes with an identity that survives us: pid, start time and boot.

A process is ended only when all three match its record, so a recycled pid is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .command import deferred_interrupts, tail
from .errors import ClusterError
from .paths import State
from .proxies import without_proxy

_STARTTIME_FIELD = 22  # of /proc/PID/stat, counted from 1: proc(5)
_STATE_FIELD = 3


@dataclass(frozen=True)
class Record:
    """One started process. `start_ticks` is its start in clock ticks after the boot `boot_id`."""

    name: str
    pid: int
    start_ticks: int
    boot_id: str
    argv: tuple[str, ...]


def stat_fields(text: str) -> tuple[str, int]:
    """(state letter, start time in ticks) of a /proc/PID/stat line; the name may hold spaces and brackets."""
    fields = text[text.rindex(")") + 2 :].split()
    return fields[_STATE_FIELD - 3], int(fields[_STARTTIME_FIELD - 3])


def boot_id() -> str:
    """The kernel's identity of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def alive(record: Record) -> bool:
    """Whether exactly this process still runs (a zombie does not)."""
    try:
        state, ticks = stat_fields(Path(f"/proc/{record.pid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX" and ticks == record.start_ticks and record.boot_id == boot_id()


class Processes:
    """The processes of one state folder."""

    def __init__(self, state: State) -> None:
        self._state = state

    def records(self) -> dict[str, Record]:
        """Every record by name, of living and dead processes."""
        found = {}
        for path in sorted(self._state.processes.glob("*.json")):
            data = json.loads(path.read_text())
            found[path.stem] = Record(**{**data, "argv": tuple(data["argv"])})
        return found

    def running(self) -> set[str]:
        """Names of those that live."""
        return {name for name, record in self.records().items() if alive(record)}

    def log(self, name: str) -> Path:
        """Where the process called `name` logs."""
        return self._state.logs / f"{name}.log"

    def ensure(self, name: str, argv: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> bool:
        """Start `name` unless it lives; True when it was started now.

        It gets `environ`, by default ours, without the variables of a proxy.
        """
        record = self.records().get(name)
        if record and alive(record):
            return False
        self._state.processes.mkdir(parents=True, exist_ok=True)
        self._state.logs.mkdir(parents=True, exist_ok=True)
        words = tuple(str(word) for word in argv)
        with deferred_interrupts():
            self._spawn(name, words, without_proxy(os.environ if environ is None else environ))
        return True

    def _spawn(self, name: str, argv: tuple[str, ...], environ: dict[str, str]) -> None:
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd="/",
                start_new_session=True,
            )
        _, ticks = stat_fields(Path(f"/proc/{child.pid}/stat").read_text())
        record = Record(name, child.pid, ticks, boot_id(), argv)
        path = self._state.processes / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(path)
        child.returncode = 0  # it outlives us on purpose: no warning about a child still running

    def check(self, names: Iterable[str]) -> None:
        """Raise ClusterError with the end of its log for a process that has died."""
        living = self.running()
        for name in names:
            if name not in living:
                raise ClusterError(
                    f"{name} ended unexpectedly; {self.log(name)} says:\n{tail(self.log(name))}"
                )

    def stop(self, name: str, seconds: float = 10.0) -> None:
        """End `name` if it lives (TERM, then KILL after `seconds`) and forget it."""
        record = self.records().get(name)
        if record is None:
            return
        if not _signal_and_wait(record, signal.SIGTERM, seconds):
            _signal_and_wait(record, signal.SIGKILL, 10.0)
        (self._state.processes / f"{name}.json").unlink(missing_ok=True)

    def kill_all(self) -> None:
        """End every process at once, for a state that is removed anyway."""
        records = self.records()
        for record in records.values():
            _signal_and_wait(record, signal.SIGKILL, 0.0)
        for name, record in records.items():
            if not _signal_and_wait(record, signal.SIGKILL, 10.0):
                raise ClusterError(f"{name} (pid {record.pid}): not gone 10 s after KILL; see what holds it")
            (self._state.processes / f"{name}.json").unlink(missing_ok=True)


def _signal_and_wait(record: Record, number: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    if alive(record):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
    while alive(record):
        _reap(record.pid)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    _reap(record.pid)
    return True


def _reap(pid: int) -> None:
    # Only our own children can be waited for; another session's process is reaped by init.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
