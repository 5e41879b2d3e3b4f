"""Prepared samples on disk: three arrays that all ranks of a node read through memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from yuan2_core.conversation import IGNORED

_ARRAYS = ("tokens", "labels", "offsets")


@dataclass(frozen=True)
class SampleStore:
    """`tokens` and `labels` [sum of lengths], int32; sample i is `offsets[i]:offsets[i + 1]`."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    labelled: NDArray[np.int32]
    """Tokens of a sample that a loss is computed for: position 0 has nothing to be predicted from."""

    @classmethod
    def open(cls, directory: Path) -> SampleStore:
        tokens, labels, offsets = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        return cls(tokens, labels, offsets, np.diff(offsets).astype(np.int32), _count_labels(labels, offsets))

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        first, last = self.offsets[index], self.offsets[index + 1]
        return self.tokens[first:last], self.labels[first:last]


def write_store(directory: Path, samples: Iterable[tuple[list[int], list[int]]]) -> None:
    """Write `(input_ids, labels)` pairs; memory grows with 8 bytes a token."""
    tokens: list[NDArray[np.int32]] = []
    labels: list[NDArray[np.int32]] = []
    for ids, marks in samples:
        tokens.append(np.asarray(ids, dtype=np.int32))
        labels.append(np.asarray(marks, dtype=np.int32))
    offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(sample) for sample in tokens], out=offsets[1:])
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "tokens.npy", _joined(tokens))
    np.save(directory / "labels.npy", _joined(labels))
    np.save(directory / "offsets.npy", offsets)


def fingerprint(directory: Path) -> str:
    """SHA-256 over the prepared arrays: what is trained on, whatever file it came from."""
    digest = hashlib.sha256()
    for name in _ARRAYS:
        digest.update(np.load(directory / f"{name}.npy", mmap_mode="r").data)
    return digest.hexdigest()


def _joined(samples: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(samples) if samples else np.zeros(0, dtype=np.int32)


def _count_labels(labels: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    marked = np.zeros(len(labels) + 1, dtype=np.int64)
    np.cumsum(labels != IGNORED, out=marked[1:])
    starts = offsets[:-1]
    first_marked = labels[starts] != IGNORED
    return (marked[offsets[1:]] - marked[starts] - first_marked).astype(np.int32)
