"""Samples of a micro batch as padded arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yuan2_core.conversation import IGNORED
from yuan2_trainer.data.order import Indices
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


def collate(store: SampleStore, indices: Indices, pad_id: int, max_length: int) -> MicroBatch:
    """Pad samples to the longest of them, rounded up to `PAD_MULTIPLE` but not above `max_length`."""
    longest = int(store.lengths[indices].max())
    width = max(longest, min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_length))
    shape = (len(indices), width)
    batch = MicroBatch(np.full(shape, pad_id), np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64))
    for row, index in enumerate(indices):
        tokens, labels = store.sample(int(index))
        batch.input_ids[row, : len(tokens)] = tokens
        batch.labels[row, : len(labels)] = labels
        batch.attention_mask[row, : len(tokens)] = 1
    return batch
