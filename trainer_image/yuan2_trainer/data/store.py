"""Prepared samples on disk: arrays that all ranks of a node read through memory maps.

Labels are not stored: a label is its token where a span covers it, so eight bytes an answer say all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yuan2_core.conversation import IGNORED, Spans

_TOKENS = "tokens.bin"
_ARRAYS = ("offsets", "lengths", "spans", "span_offsets", "labelled", "conversations")
_MARKS = "marks"


@dataclass(frozen=True)
class Block:
    """Samples one after the other.

    Attributes:
        tokens: [sum of lengths] int32.
        lengths: tokens of each sample, int32.
        spans: [S, 2] int32, first learned token and the one after the last, counted from the sample's first.
        span_counts: spans of each sample, int32.
        family_sizes: samples of each conversation, int32.
        marks: what each sample is to a comparison, int8; all 0 where nothing is compared.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_counts: NDArray[np.int32]
    family_sizes: NDArray[np.int32]
    marks: NDArray[np.int8]

    @classmethod
    def of(cls, conversations: Sequence[Sequence[Spans]], marks: Sequence[int] | None = None) -> Block:
        """The samples of some conversations, with a mark for each sample where they are compared."""
        samples = [sample for conversation in conversations for sample in conversation]
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(sample.ids for sample in samples)]),
            np.asarray([len(sample.ids) for sample in samples], dtype=np.int32),
            np.concatenate([np.zeros((0, 2), np.int32), *(sample.learned for sample in samples)]),
            np.asarray([len(sample.learned) for sample in samples], dtype=np.int32),
            np.asarray([len(conversation) for conversation in conversations], dtype=np.int32),
            np.asarray([0] * len(samples) if marks is None else marks, dtype=np.int8),
        )


@dataclass(frozen=True)
class SampleStore:
    """Sample i is `tokens[offsets[i]:offsets[i + 1]]`; its spans are `spans[span_offsets[i]:...[i + 1]]`."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_offsets: NDArray[np.int64]
    labelled: NDArray[np.int32]
    """Tokens of a sample that a loss is computed for: position 0 has nothing to be predicted from."""
    conversations: NDArray[np.int32]
    """Number of the conversation that a sample was made of; it never falls from one sample to the next."""
    marks: NDArray[np.int8]
    """What a sample is to a comparison: `CHOSEN`, `REJECTED` or `MISMATCHED`; 0 where nothing is compared."""

    @classmethod
    def open(cls, directory: Path) -> SampleStore:
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in (*_ARRAYS, _MARKS)}
        total = int(arrays["offsets"][-1])
        tokens: NDArray[np.int32] = (
            np.memmap(directory / _TOKENS, np.int32, mode="r", shape=(total,))
            if total
            else np.zeros(0, np.int32)
        )
        return cls(tokens, **arrays)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens_of(self, index: int) -> NDArray[np.int32]:
        """Tokens of a sample."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def first_learned(self, index: int) -> int:
        """Place of a sample's first learned token; its length where it has none."""
        if self.span_offsets[index] == self.span_offsets[index + 1]:
            return int(self.lengths[index])
        return int(self.spans[self.span_offsets[index], 0])

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and labels of a sample, `IGNORED` where nothing is learned."""
        tokens = self.tokens_of(index)
        labels = np.full(len(tokens), IGNORED, dtype=np.int32)
        for first, last in self.spans[self.span_offsets[index] : self.span_offsets[index + 1]].tolist():
            labels[first:last] = tokens[first:last]
        return tokens, labels


@dataclass
class StoreWriter:
    """Writes a store block by block; memory grows with 20 bytes a sample, not with tokens."""

    directory: Path
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    _blocks: list[Block] = field(default_factory=list)

    def __enter__(self) -> StoreWriter:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = (self.directory / _TOKENS).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, block: Block) -> None:
        """Append samples."""
        content = np.ascontiguousarray(block.tokens).data
        self._file.write(content)
        self._digest.update(content)
        self._blocks.append(replace(block, tokens=block.tokens[:0].copy()))

    def finish(self) -> str:
        """Make it complete on disk.

        Returns:
            SHA-256 over tokens, lengths and spans: what is trained on, whatever file it came from.
        """
        lengths = np.concatenate([np.zeros(0, np.int32), *(b.lengths for b in self._blocks)])
        spans = np.concatenate([np.zeros((0, 2), np.int32), *(b.spans for b in self._blocks)])
        span_offsets = _offsets(
            np.concatenate([np.zeros(0, np.int32), *(b.span_counts for b in self._blocks)])
        )
        sizes = np.concatenate([np.zeros(0, np.int32), *(b.family_sizes for b in self._blocks)])
        arrays: tuple[NDArray[Any], ...] = (
            _offsets(lengths),
            lengths,
            spans,
            span_offsets,
            _count_labels(spans, span_offsets),
            np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        )
        marks = np.concatenate([np.zeros(0, np.int8), *(b.marks for b in self._blocks)])
        for name, array in zip((*_ARRAYS, _MARKS), (*arrays, marks), strict=True):
            # Data without comparisons keep the fingerprint that they had before there were any.
            if name != _MARKS or marks.any():
                self._digest.update(np.ascontiguousarray(array).data)
            with (self.directory / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def write_store(directory: Path, samples: Iterable[Spans]) -> str:
    """Write a store of samples that fit into memory, each a conversation; returns its fingerprint."""
    with StoreWriter(directory) as writer:
        writer.add(Block.of([[sample] for sample in samples]))
        return writer.finish()


def _offsets(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _count_labels(spans: NDArray[np.int32], span_offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    counted = _offsets((spans[:, 1] - np.maximum(spans[:, 0], 1)).clip(min=0))
    return (counted[span_offsets[1:]] - counted[span_offsets[:-1]]).astype(np.int32)
