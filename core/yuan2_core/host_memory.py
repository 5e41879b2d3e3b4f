"""How much memory of the host this pod could still take."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int | None:
    """Bytes that can be allocated without swapping or being killed; None where nothing tells.

    The machine's `MemAvailable`, or what the pod's own limit leaves where that is less. Pages of files that
    the pod has read count towards its limit, but go when they are in the way (cgroup-v2.rst, `memory.stat`).
    """
    found = [room for room in (_machine(meminfo), _limit_v2(cgroup), _limit_v1(cgroup)) if room is not None]
    return min(found) if found else None


def _machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _limit_v2(cgroup: Path) -> int | None:
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" is no number
        return limit - int((cgroup / "memory.current").read_text()) + _file_pages(cgroup / "memory.stat")
    except (OSError, ValueError):
        return None


def _limit_v1(cgroup: Path) -> int | None:
    folder = cgroup / "memory"
    try:
        limit = int((folder / "memory.limit_in_bytes").read_text())
        used = int((folder / "memory.usage_in_bytes").read_text())
        return limit - used + _file_pages(folder / "memory.stat")
    except (OSError, ValueError):
        return None


def _file_pages(stat: Path) -> int:
    lines = (line.split() for line in stat.read_text().splitlines())
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] == "inactive_file")
