"""Real tokens over computed ones, of global batches as the trainer cuts, spreads and pads them."""

from __future__ import annotations

from pathlib import Path

from tests.bench.report import Row, at_least, plain
from yuan2_core.sections import Training
from yuan2_trainer.data.collate import collate
from yuan2_trainer.data.order import epoch_order, share_of_rank
from yuan2_trainer.data.packing import cut_batch
from yuan2_trainer.data.store import SampleStore

LENGTHS, RANKS, MICRO_BATCH = (2048, 1024), (1, 8), 4
"""Ranks as one GPU and as the recipe's eight, each with the recipe's four rows a micro batch."""
BATCHES = 50
GOAL = 0.98


def measure(directory: Path, batch: int) -> list[Row]:
    """Both lengths on one rank and on eight, and how full the rows are of what they might hold."""
    store = SampleStore.open(directory)
    rows = []
    for length in LENGTHS:
        for ranks in RANKS:
            real, computed, room = count(store, batch, length, ranks)
            sizes = f"batches of {batch}, rows of {length:,}, {ranks} rank{'s' if ranks > 1 else ''}"
            share = plain("real tokens over computed tokens", real / computed, "", sizes)
            rows += [
                at_least(share, GOAL),
                plain("real tokens over what full rows hold", real / room, "", sizes),
            ]
    return rows


def count(store: SampleStore, batch: int, length: int, ranks: int) -> tuple[int, int, int]:
    """Tokens of samples, tokens of the arrays that go through the model, and rows times `length`, over some
    global batches of an epoch."""
    order = epoch_order(store.conversations, Training().seed, 0)
    order = order[store.lengths[order] <= length]
    real = computed = room = 0
    for start in range(0, min(len(order), BATCHES * batch) - batch + 1, batch):
        samples = order[start : start + batch]
        real += int(store.lengths[samples].sum())
        cut = cut_batch(samples, store, MICRO_BATCH, length, ranks, packing=True)
        room += length * sum(map(len, cut))
        for rank in range(ranks):
            for rows in share_of_rank(cut, rank, ranks):
                # As the stepper: a rank with nothing left computes a sample that counts for nothing.
                computed += collate(store, [samples[:1]] if rows is None else rows, 0, length).input_ids.size
    return real, computed, room
