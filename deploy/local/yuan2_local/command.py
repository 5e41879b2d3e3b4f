"""Running other programs, showing steps, and holding back Ctrl-C where half a step would leak."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from .errors import ClusterError

_TAIL_LINES = 15


def run(
    argv: Sequence[str | Path],
    *,
    environ: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> str:
    """Run to completion and return stdout; with `log`, both streams are appended there instead.

    Raises ClusterError with the end of the program's output when it fails or is not installed.
    """
    words = [str(word) for word in argv]
    try:
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(log.open("ab")) if log else subprocess.PIPE
            done = subprocess.run(
                words,
                input=None if stdin is None else stdin.encode(),
                stdin=subprocess.DEVNULL if stdin is None else None,
                stdout=sink,
                stderr=subprocess.STDOUT if log else subprocess.PIPE,
                env=None if environ is None else dict(environ),
                cwd=cwd,
                check=False,
            )
    except FileNotFoundError as error:
        raise ClusterError(
            f"{words[0]}: not found; install it or run `cluster.py up` as root, which does"
        ) from error
    if done.returncode != 0:
        said = tail(log) if log else (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ClusterError(f"{' '.join(words[:4])} … failed with {done.returncode}: {said}")
    return "" if log else done.stdout.decode(errors="replace")


def tail(path: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log, or a note that there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return f"(no log at {path})"


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title, then the seconds it took, on one line."""
    start = time.monotonic()
    print(f"{title} ... ", end="", flush=True)
    try:
        yield
    except BaseException:
        print(f"failed after {time.monotonic() - start:.1f} s", flush=True)
        raise
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def note(text: str) -> None:
    """Tell the user something that is neither a step nor a result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends, so that it happens wholly or not at all.

    A child started inside still receives them as usual. Outside the main thread Python never delivers
    signals, so there is nothing to hold back there.
    """
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    with contextlib.suppress(ValueError):
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, remember)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for, then hold, a lock shared by every process of this machine that names the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def exclusive_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody does; yields whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def wait_until(what: str, ready: Callable[[], bool], seconds: float, interval: float = 0.1) -> None:
    """Poll `ready` until it returns true; ClusterError naming `what` when time is up."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not ready after {seconds:.0f} s")
        time.sleep(interval)
