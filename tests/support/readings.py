"""What `tests.support.reading_rank` left behind."""

from __future__ import annotations

from pathlib import Path


def note_name(rank: int) -> str:
    """The file in a workspace."""
    return f"reads-{rank}.txt"


def readings(workspace: Path, rank: int) -> list[tuple[str, int]]:
    """Names of the tensors that a rank read, in order, and how many bytes of each."""
    lines = (workspace / note_name(rank)).read_text().splitlines()
    return [(name, int(size)) for name, size in (line.split() for line in lines)]
