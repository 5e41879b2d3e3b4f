"""Samples of one conversation that share their beginning in a row.

`split_example` makes a sample of each answer: the conversation up to its question, and the answer. Its prompt
is the beginning of the prompts that follow, but for a token or two at the end. The model is causal in all
its parts, so what it computes of a beginning does not depend on what comes after: a row holds the beginning
once, and each sample adds its own end (`previous_ids` of the model). Loss and gradients are those of the
samples alone, for N turns of one size with some 2 / N of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from yuan2_trainer.data.order import Indices
from yuan2_trainer.data.store import SampleStore

LEAST_SHARED = 16
"""A shorter common beginning is not worth a segment of its own in attention."""


@dataclass(frozen=True)
class Family:
    """Samples of one conversation, the first of them whole, and the others from where they differ from it."""

    samples: Indices
    shared: tuple[int, ...]
    """Tokens of each sample that are the first one's; 0 where it stands for itself."""
    size: int
    """Tokens in the row."""


def families(batch: Indices, store: SampleStore, capacity: int) -> list[Family]:
    """The samples of a batch as families of at most `capacity` tokens, in their order.

    Args:
        batch: samples; those of a conversation are neighbours.
        store: where they are.
        capacity: tokens of a row; at least those of the longest sample.
    """
    borders = np.flatnonzero(np.diff(store.conversations[batch])) + 1
    found = []
    for samples in np.split(batch, borders):
        found += [_single(samples, store)] if len(samples) == 1 else _families_of(samples, store, capacity)
    return found


def work_of(items: Sequence[Family], store: SampleStore) -> tuple[int, int]:
    """Tokens that the model computes for some families, and the (query, key) pairs of their attention."""
    lengths = np.concatenate([store.lengths[item.samples] for item in items]).astype(np.int64)
    shared = np.asarray([count for item in items for count in item.shared], dtype=np.int64)
    own = lengths - shared
    return int(own.sum()), int((own * shared + own * (own + 1) // 2).sum())


def family_of(row: Indices, store: SampleStore) -> Iterator[Family]:
    """The families that lie in a row one after the other, each led by its whole sample."""
    borders = np.flatnonzero(np.diff(store.conversations[row])) + 1
    for samples in np.split(row, borders):
        yield _family(samples, store)


def _families_of(samples: Indices, store: SampleStore, capacity: int) -> list[Family]:
    """The last sample has the longest prompt: it leads as many of the others as have room beside it."""
    waiting = np.sort(samples)[::-1]
    found = []
    while len(waiting):
        whole = _family(waiting, store)
        own = store.lengths[waiting] - np.asarray(whole.shared)
        taken = max(1, int(np.searchsorted(np.cumsum(own), capacity, side="right")))
        members, waiting = waiting[:taken], waiting[taken:]
        found.append(Family(members, whole.shared[:taken], int(own[:taken].sum())))
    return found


def _single(samples: Indices, store: SampleStore) -> Family:
    return Family(samples, (0,), int(store.lengths[samples[0]]))


def _family(samples: Indices, store: SampleStore) -> Family:
    leader = store.tokens_of(int(samples[0]))
    shared = (0, *(_shared(leader, int(sample), store) for sample in samples[1:]))
    return Family(samples, shared, int(store.lengths[samples].sum()) - sum(shared))


def _shared(leader: np.ndarray, sample: int, store: SampleStore) -> int:
    """Tokens from the first one on that a sample has in common with the leader of its family.

    Its first own token is one that is not learned: several tokens come after the last shared one, and the
    model's loss asks for what follows a token in one place only.
    """
    limit = min(len(leader), store.first_learned(sample) - 1)
    if limit < LEAST_SHARED:
        return 0
    different = leader[:limit] != store.tokens_of(sample)[:limit]
    count = int(different.argmax()) if different.any() else limit
    return count if count >= LEAST_SHARED else 0
