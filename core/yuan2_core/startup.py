"""The first moments of a program, before its imports. This module itself imports next to nothing."""

from __future__ import annotations

import os
import signal


def end_on_sigterm(exit_code: int) -> None:
    """Let SIGTERM end this process at once with `exit_code`, until the program sets a handler of its own.

    A container's first process has no default action: the kernel discards a SIGTERM that finds no handler
    (pid_namespaces(7)), nobody sends it again, and the pod lasts until its grace period is over.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(exit_code))
