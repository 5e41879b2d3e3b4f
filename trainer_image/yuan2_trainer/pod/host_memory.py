"""Memory of the host: keeping what this process took, or giving it back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
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


def return_freed_memory() -> None:
    """Take each large block from the kernel again and give it back, as glibc does by itself.

    Blocks that are kept serve the same sizes again and again, as in training. Where sizes change, aligned
    blocks leave holes that no other one fits into, and a process grows without holding more
    (https://sourceware.org/bugzilla/show_bug.cgi?id=14581).
    """
    try:
        library = ctypes.CDLL(None)
        for option, value in (
            (_M_MMAP_MAX, 1 << 16),
            (_M_MMAP_THRESHOLD, 1 << 17),
            (_M_TRIM_THRESHOLD, 1 << 17),
        ):
            library.mallopt(option, value)
        library.malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library, in which nothing was kept
