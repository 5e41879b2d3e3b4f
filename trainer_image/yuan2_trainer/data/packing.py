"""Several samples in one row: how a global batch becomes rows of the model.

A global batch counts samples, packed or not, so packing changes how fast a step is and never what is
learned from which sample: hyperparameters keep their meaning. Its samples are put into rows of at most
`max_length` tokens; documents stay isolated in the model, so any way to pack them gives the same loss and
the same gradients.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from yuan2_trainer.data.families import Family, families
from yuan2_trainer.data.order import Indices, micro_batches
from yuan2_trainer.data.store import SampleStore

Row = Indices
"""Samples that lie one after the other in a row; of a conversation, the first is whole."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest item first, each into the fullest row that still has room for it.

    Deterministic; at most 11/9 of the fewest rows possible, plus one (Johnson et al. 1974).

    Args:
        lengths: tokens of each item, each at most `capacity`.
        capacity: tokens of a row.

    Returns:
        Positions in `lengths`, row by row; every position once.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[item])
        found = bisect_left(room, (length, -1))
        if found < len(room):
            left, row = room.pop(found)
            rows[row].append(item)
        elif length <= capacity:
            left, row = capacity, len(rows)
            rows.append([item])
        else:
            raise ValueError(f"an item of {length} tokens does not fit into a row of {capacity}")
        insort(room, (left - length, row))
    return rows


def pack_evenly(lengths: Sequence[int], count: int, capacity: int) -> list[list[int]]:
    """Pack into at most `count` rows that are as equally full as can be found.

    The smallest capacity for which best-fit needs no more than `count` rows, searched by halves: MULTIFIT
    (Coffman, Garey and Johnson 1978), with best fit.

    Args:
        lengths: tokens of each item, each at most `capacity`.
        count: at least as many rows as `pack(lengths, capacity)` has.
        capacity: most tokens of a row.
    """
    best = pack(lengths, capacity)
    low = max(*lengths, -(-sum(lengths) // count))
    high = capacity
    while low < high:
        middle = (low + high) // 2
        rows = pack(lengths, middle)
        if len(rows) <= count:
            best, high = rows, middle
        else:
            low = middle + 1
    return best


def packed_micro_batches(
    items: Sequence[Family], micro_batch_size: int, max_length: int, world_size: int
) -> list[list[Row]]:
    """A global batch as micro batches of rows for all ranks, in turns, alike in tokens.

    As few rounds as rows of `max_length`, `micro_batch_size` of them a rank and round, allow; within these
    the samples are spread over all ranks evenly, so that a small batch does not leave ranks idle.
    """
    sizes = [item.size for item in items]
    needed = len(pack(sizes, max_length))
    slots = world_size * -(-needed // (micro_batch_size * world_size))
    rows = pack_evenly(sizes, min(slots * -(-needed // slots), len(sizes)), max_length)
    rows.sort(key=lambda row: (-sum(sizes[item] for item in row), row))
    packed = [np.concatenate([items[item].samples for item in row]) for row in rows]
    cuts = [number * len(packed) // slots for number in range(slots + 1)]
    return [packed[first:last] for first, last in pairwise(cuts) if first < last]


def cut_batch(
    batch: Indices,
    store: SampleStore,
    micro_batch_size: int,
    max_length: int,
    world_size: int,
    *,
    packing: bool,
) -> list[list[Row]]:
    """A global batch as micro batches of rows: packed, or a sample a row."""
    if packing:
        items = families(batch, store, max_length)
        return packed_micro_batches(items, micro_batch_size, max_length, world_size)
    cut = micro_batches(batch, store.lengths, micro_batch_size)
    return [[indices[i : i + 1] for i in range(len(indices))] for indices in cut]


def cut_families(
    batch: Indices,
    store: SampleStore,
    micro_batch_size: int,
    max_length: int,
    world_size: int,
    *,
    packing: bool,
) -> list[list[Row]]:
    """A global batch whose samples of one conversation stay in one row: packed, or a conversation a row.

    `max_length` must hold all samples of any conversation.
    """
    items = families(batch, store, max_length)
    if packing:
        return packed_micro_batches(items, micro_batch_size, max_length, world_size)
    rows = [item.samples for item in sorted(items, key=lambda item: -item.size)]
    return [rows[first : first + micro_batch_size] for first in range(0, len(rows), micro_batch_size)]
