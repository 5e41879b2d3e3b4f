"""Memory of the host: keeping what this process took."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; a step then finds what the step before it had.

    glibc takes each large block from the kernel and gives it back, and the kernel clears its pages every
    time: on CPU that costs about as much as all of a step's element-wise work.

    Returns:
        Whether this C library could be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library; only speed is lost
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
