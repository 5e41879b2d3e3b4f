"""Rows of a micro batch as padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yuan2_core.conversation import IGNORED
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


def collate(store: SampleStore, rows: Sequence[Row], pad_id: int, max_length: int) -> MicroBatch:
    """Pad rows to the longest of them, rounded up to `PAD_MULTIPLE` but not above `max_length`."""
    longest = max(int(store.lengths[row].sum()) for row in rows)
    width = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_length))
    shape = (len(rows), width)
    ids, marks, documents = np.full(shape, pad_id), np.full(shape, IGNORED), np.full(shape, -1)
    for number, row in enumerate(rows):
        first = 0
        for document, index in enumerate(row):
            tokens, labels = store.sample(int(index))
            last = first + len(tokens)
            ids[number, first:last] = tokens
            marks[number, first:last] = labels
            documents[number, first:last] = document
            first = last
    packed = any(len(row) > 1 for row in rows)
    mask = (documents >= 0).astype(np.int64)
    return MicroBatch(ids, marks, mask, documents if packed else None)
