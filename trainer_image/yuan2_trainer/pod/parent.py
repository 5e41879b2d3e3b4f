"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "YUAN2_PARENT_PID"
"""Tells a process who started it: that one may be dead before the process can ask for its parent."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no rank is left computing for
    nobody."""
    parent = int(os.environ.pop(PARENT, None) or os.getppid())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)
