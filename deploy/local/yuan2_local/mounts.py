"""Mounts below our own folders, and removing them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from .command import run
from .errors import ClusterError


def mounts_below(mountinfo: str, roots: Iterable[Path]) -> list[str]:
    """Mount points at or below `roots` in /proc/self/mountinfo text, deepest first."""
    prefixes = [str(root) for root in roots]
    found = []
    for line in mountinfo.splitlines():
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if any(point == prefix or point.startswith(f"{prefix}/") for prefix in prefixes):
            found.append(point)
    return sorted(found, key=lambda point: -point.count("/"))


def unmount_below(*roots: Path) -> None:
    """Unmount everything at or below `roots`; a busy mount is detached, to vanish when its last user ends.

    Raises ClusterError when one stays: what is below a mount must not be removed.
    """
    for point in _current(roots):
        _unmount(point)
    left = _current(roots)
    if left:
        raise ClusterError(
            f"{left[0]}: cannot be unmounted; end what uses it (`fuser -vm {left[0]}`), then try again"
        )


def _current(roots: Iterable[Path]) -> list[str]:
    return mounts_below(Path("/proc/self/mountinfo").read_text(), roots)


def _unmount(point: str) -> None:
    try:
        run(["umount", point])
    except ClusterError:
        # Listed twice through propagation, perhaps gone already; whoever called looks again.
        with contextlib.suppress(ClusterError):
            run(["umount", "--lazy", point])
