"""What a checkpoint says about itself, and which of several is the one to go on from. No torch.

checkpoints/step-000123/
    manifest.json                          written last: a directory without it is incomplete
    shard-00000-of-00002.safetensors       one a rank
checkpoints/step-000246.partial/           being written, or left behind by a run that died
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from yuan2_trainer.data.order import Position
from yuan2_trainer.evaluation.standing import Standing

MANIFEST = "manifest.json"
PARTIAL = ".partial"
BYTES_PER_PARAMETER = 12
"""fp32 master weights and AdamW's two moments."""

_CHUNK = 1 << 22


class ShardFile(BaseModel):
    """One rank's file."""

    size: int
    """Bytes."""
    sha256: str
    fragments: dict[str, tuple[int, int]]
    """Parameter name to (first element, number of elements) of its flattened value."""


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    version: Literal[1] = 1
    step: int
    epoch: int
    offset: int
    """Samples taken from that epoch."""
    optimizer_step: int | None = None
    """AdamW's count of steps, less than `step` by those that were skipped; absent: none was."""
    total_steps: int
    world_size: int
    stage: int
    identity: dict[str, Any]
    """What must not change between the attempts of one run: see `identity.run_identity`."""
    lasting: bool = True
    """One of those that `checkpoint.keep` counts; any other goes when a newer one is complete."""
    standing: Standing | None = None
    """What evaluations have shown up to here, if there are any."""
    shapes: dict[str, list[int]]
    files: dict[str, ShardFile]

    @property
    def position(self) -> Position:
        return Position(self.step, self.epoch, self.offset)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    directory: Path
    manifest: Manifest


def checkpoint_name(step: int) -> str:
    """`step-000123`: sorts by step."""
    return f"step-{step:06d}"


def candidates(root: Path) -> list[Path]:
    """Directories that may be checkpoints, newest first."""
    if not root.is_dir():
        return []
    found = [item for item in root.iterdir() if step_of(item) is not None]
    return sorted(found, key=lambda item: step_of(item) or 0, reverse=True)


def step_of(directory: Path) -> int | None:
    """The step in a checkpoint's name, `None` for anything else."""
    head, _, digits = directory.name.partition("step-")
    return int(digits) if head == "" and digits.isascii() and digits.isdigit() else None


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and compare the files' sizes with it.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the text says how.
    """
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{MANIFEST} is not a manifest: {error.errors()[0]['msg']}") from error
    for name, file in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            raise ValueError(f"{name} has {'no' if size is None else size} bytes instead of {file.size}")
    _check_coverage(manifest)
    return manifest


def verify_file(directory: Path, name: str, file: ShardFile) -> str | None:
    """What is wrong with a file's content, or `None`."""
    digest = hashlib.sha256()
    try:
        with (directory / name).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None if digest.hexdigest() == file.sha256 else f"{name} does not have its checksum"


def complete_checkpoints(root: Path, warn: Callable[[str], None]) -> Iterator[Found]:
    """Checkpoints with all files in their full sizes, newest first; `warn` hears of the others."""
    for directory in candidates(root):
        found = open_checkpoint(directory, warn)
        if found is not None:
            yield found


def open_checkpoint(directory: Path, warn: Callable[[str], None]) -> Found | None:
    """A checkpoint whose files have their full sizes; `None` for any other, of which `warn` hears."""
    try:
        return Found(directory, read_manifest(directory))
    except ValueError as error:
        warn(f"checkpoint {directory.name} is skipped: {error}")
        return None


def surplus(root: Path, keep: int, damaged: Collection[Path] = ()) -> list[Path]:
    """Complete checkpoints beyond the newest, the `keep` newest lasting ones, and the best one that they know
    of.

    Args:
        root: where checkpoints lie.
        keep: how many stay.
        damaged: directories that do not have their checksums, though they look complete. They never push out
            a good one, and go once there is a newer good one.
    """
    every = list(complete_checkpoints(root, lambda _: None))
    complete = [found for found in every if found.directory not in damaged]
    lasting = [found for found in complete if found.manifest.lasting]
    kept = [found for found in complete if found is complete[0] or found in lasting[: max(1, keep)]]
    others = [found for found in complete if found not in kept]
    best = {found.manifest.standing.best_step for found in kept if found.manifest.standing is not None}
    worthless = [found for found in every if found.directory in damaged and _is_older(found, complete)]
    return [found.directory for found in [*others, *worthless] if found.manifest.step not in best]


def _is_older(found: Found, complete: list[Found]) -> bool:
    return bool(complete) and found.manifest.step < complete[0].manifest.step


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint so that half of it can never be taken for a whole: the manifest goes first."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def remove_partials(root: Path) -> None:
    """Delete what runs that died left behind."""
    for directory in root.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(directory, ignore_errors=True)


def _check_coverage(manifest: Manifest) -> None:
    """Every element of every parameter is in exactly one file."""
    pieces: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for file in manifest.files.values():
        for name, piece in file.fragments.items():
            pieces.setdefault(name, []).append(piece)
    for name, found in pieces.items():
        expected = 0
        for start, numel in sorted(found):
            if start != expected:
                raise ValueError(f"{name} is not stored whole")
            expected += numel
        if expected != _numel(manifest.shapes.get(name, [0])):
            raise ValueError(f"{name} is not stored whole")


def _numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
