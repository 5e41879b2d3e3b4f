"""Content keys: names of built things that change exactly when their inputs do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_IGNORED_DIRECTORIES = frozenset({"__pycache__", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
_IGNORED_SUFFIXES = (".pyc", ".egg-info")


def files_below(path: Path) -> Iterator[Path]:
    """Files of a tree (or the file itself) in a stable order, without caches of tools."""
    if path.is_file():
        yield path
        return
    for entry in sorted(path.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(_IGNORED_SUFFIXES):
            continue
        if entry.is_dir():
            if entry.name not in _IGNORED_DIRECTORIES:
                yield from files_below(entry)
        else:
            yield entry


def content_key(paths: Iterable[Path], root: Path, facts: Mapping[str, str], length: int = 16) -> str:
    """Hex digest over the files' relative names, contents and executable bits, and over `facts`.

    Raises FileNotFoundError when a path does not exist: a key over missing inputs would name nothing.
    """
    digest = hashlib.sha256()
    for name, value in sorted(facts.items()):
        digest.update(f"{name}={value}\0".encode())
    for path in paths:
        for file in files_below(path):
            executable = "x" if file.stat().st_mode & 0o100 else "-"
            digest.update(f"{file.relative_to(root).as_posix()}\0{executable}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:length]
