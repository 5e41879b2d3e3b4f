"""Where the ranks of this pod are: their Python stacks, written by a signal, without any privilege.

`faulthandler` writes from the signal's handler in C, so a rank that waits in a collective or in native code,
or holds the interpreter's lock, answers as well. One that is stopped, or waits in the kernel, does not, and
that is said of it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from yuan2_trainer.pod.workspace import Workspace

PATIENCE = 2.0
"""Seconds that ranks are given to write."""
QUIET = 0.1
"""A file that has not grown for so many seconds is complete."""
_POLL_SECONDS = 0.02
_kept: list[IO[str]] = []
"""The handler writes to the file's descriptor, so it must stay open."""


def write_on_signal(workspace: Workspace, rank: int) -> None:
    """From now on this process writes the stacks of all its threads when it gets SIGUSR1."""
    path = workspace.stacks(rank, os.getpid())
    beside = path.with_name(f".{path.name}")
    file = beside.open("w", encoding="utf-8")
    _kept.append(file)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    # Only now can it be found: before, the signal would have ended the process.
    beside.rename(path)


def read_stacks(workspace: Workspace) -> str:
    """The stacks of all ranks of this pod as they are now, as text; those of the main threads come last."""
    files = {path: path.stat().st_size for path in workspace.all_stacks()}
    for path in files:
        with suppress(ProcessLookupError):
            os.kill(_pid(path), signal.SIGUSR1)
    _wait(files)
    parts = []
    for path, before in files.items():
        with path.open(encoding="utf-8", errors="replace") as file:
            file.seek(before)
            text = file.read().strip()
        parts.append(f"=== rank {_rank(path)} (pid {_pid(path)}) ===\n{text or _silent(_pid(path))}\n")
    return "\n".join(parts) or "no rank has started yet\n"


def _wait(files: dict[Path, int]) -> None:
    """Until all have grown and grow no more, or the patience is over."""
    end, sizes, since = time.monotonic() + PATIENCE, dict(files), time.monotonic()
    while time.monotonic() < end:
        now = {path: path.stat().st_size for path in files}
        if now != sizes:
            sizes, since = now, time.monotonic()
        grown = all(now[path] > before for path, before in files.items())
        if grown and time.monotonic() - since > QUIET:
            return
        time.sleep(_POLL_SECONDS)


def _silent(pid: int) -> str:
    """What the kernel says of a process that has not written."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("State:"):
                state = line.removeprefix("State:").strip()
                return f"wrote no stack within {PATIENCE:.0f} s; the kernel says of it: {state}"
    return "has ended"


def _rank(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _pid(path: Path) -> int:
    return int(path.stem.split("-")[2])
