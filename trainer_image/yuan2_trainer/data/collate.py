"""Rows of a micro batch as padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yuan2_core.conversation import IGNORED
from yuan2_trainer.data.families import Family, family_of
from yuan2_trainer.data.packing import Row
from yuan2_trainer.data.store import SampleStore

PAD_MULTIPLE = 8
"""Sequence lengths are rounded up to this: tensor cores want multiples of 8 (NVIDIA's guide to mixed
precision)."""


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded rows, all [B, T] int64."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None
    """Number of each token's sample within its row, -1 in the padding; None when every row has one sample."""
    previous_ids: NDArray[np.int64] | None = None
    """Instead, where samples share a beginning: column of the token before each one in its sample, or -1."""


def collate(store: SampleStore, rows: Sequence[Row], pad_id: int, max_length: int) -> MicroBatch:
    """Pad rows to the longest of them, rounded up to `PAD_MULTIPLE` but not above `max_length`."""
    held = [list(family_of(row, store)) for row in rows]
    longest = max(sum(family.size for family in row) for row in held)
    width = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_length))
    shape = (len(rows), width)
    ids, marks, documents = np.full(shape, pad_id), np.full(shape, IGNORED), np.full(shape, -1)
    previous = np.broadcast_to(np.arange(-1, width - 1), shape).copy()
    for number, row in enumerate(held):
        arrays = (ids[number], marks[number], documents[number], previous[number])
        column = 0
        for family in row:
            column = _place(family, store, arrays, column)
        previous[number, column : column + 1] = -1
    shared = any(any(family.shared) for row in held for family in row)
    packed = any(len(row) > 1 for row in rows)
    mask = (documents >= 0).astype(np.int64)
    return MicroBatch(
        ids, marks, mask, documents if packed and not shared else None, previous if shared else None
    )


def _place(family: Family, store: SampleStore, arrays: tuple[NDArray[np.int64], ...], start: int) -> int:
    """Write a family into a row from a column on; returns the column after it."""
    ids, marks, documents, previous = arrays
    first, document = start, int(documents[start - 1]) if start else -1
    for sample, shared in zip(family.samples.tolist(), family.shared, strict=True):
        tokens, labels = store.sample(sample)
        last = first + len(tokens) - shared
        document += 1
        ids[first:last] = tokens[shared:]
        marks[first:last] = labels[shared:]
        documents[first:last] = document
        previous[first] = start + shared - 1 if shared else -1
        first = last
    return first
