"""Which samples an optimizer step sees: pure functions of seed, epoch and position.

A position counts samples, not batches, so that a run picked up with another number of ranks, and so another
global batch, goes on at the very next sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from yuan2_core.sections import DEFAULT_EPOCHS, Training

Indices = NDArray[np.int64]
Micro = TypeVar("Micro")


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and samples taken from the current epoch."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Course:
    """How far a run goes: `epochs` passes over `samples`, or `max_steps` optimizer steps."""

    samples: int
    global_batch: int
    epochs: float
    max_steps: int | None = None
    together: int = 1
    """Samples that no batch separates: neighbours, as many at a time."""

    @classmethod
    def of(cls, training: Training, samples: int, global_batch: int, together: int = 1) -> Course:
        epochs = training.epochs if training.epochs is not None else DEFAULT_EPOCHS
        return cls(samples, global_batch, epochs, training.max_steps, together)

    def epoch_length(self, epoch: int) -> int:
        """Samples taken from an epoch: all of them, or the last epoch's fraction rounded up."""
        if self.max_steps is not None:
            return self.samples
        # 1e-9: 0.1 * 30 must not become 4 samples because of binary fractions.
        share = min(1.0, max(0.0, self.epochs - epoch))
        items = self.samples // self.together
        return min(self.samples, self.together * math.ceil(share * items - 1e-9))

    def remaining_steps(self, at: Position) -> int:
        """Optimizer steps from a position to the end."""
        if self.max_steps is not None:
            return max(0, self.max_steps - at.step)
        left_now = self._batches(max(0, self.epoch_length(at.epoch) - at.offset))
        return left_now + sum(
            self._batches(self.epoch_length(epoch)) for epoch in range(at.epoch + 1, math.ceil(self.epochs))
        )

    def total_steps(self, at: Position) -> int:
        """Steps of the whole run, those up to the position included."""
        return at.step + self.remaining_steps(at)

    def steps(self, at: Position) -> Iterator[tuple[Position, int, int, int]]:
        """`(position after the step, epoch, first, last)`: samples [first, last) of that epoch's order.

        The last batch of an epoch holds what is left of it; a batch never reaches into the next epoch.
        """
        for _ in range(self.remaining_steps(at)):
            length = self.epoch_length(at.epoch)
            if at.offset >= length:
                at = Position(at.step, at.epoch + 1, 0)
                length = self.epoch_length(at.epoch)
            last = min(at.offset + self.global_batch, length)
            after = Position(at.step + 1, at.epoch, last)
            yield after, at.epoch, at.offset, last
            at = after

    def epochs_done(self, at: Position) -> float:
        """Passes over the data up to a position."""
        return at.epoch + at.offset / self.samples

    def _batches(self, samples: int) -> int:
        return -(-samples // self.global_batch)


def epoch_order(conversations: NDArray[np.int32], seed: int, epoch: int) -> Indices:
    """A permutation of the samples for this seed and epoch.

    Conversations are shuffled, and the samples of one stay neighbours, in their order: so they come into one
    batch, where they can share their beginning. Sorting by a hash of (seed, epoch, conversation) depends on
    no library's generator, so that a run resumes in the same order under another version of numpy.

    Args:
        conversations: number of each sample's conversation, never falling.
        seed: of the run.
        epoch: counted from 0.
    """
    count = len(conversations)
    firsts = np.flatnonzero(np.diff(conversations, prepend=-1))
    sizes = np.diff(firsts, append=count)
    index = np.arange(len(firsts), dtype=np.uint64)
    with np.errstate(over="ignore"):
        key = mix(mix(np.uint64(seed & (2**64 - 1)) + np.zeros_like(index)) + np.uint64(epoch))
        order = np.argsort(mix(key + index), kind="stable")
    ends = np.cumsum(sizes[order])
    return (np.arange(count) + np.repeat(firsts[order] - ends + sizes[order], sizes[order])).astype(np.int64)


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 generator's step and finaliser (Steele, Lea, Flood 2014)."""
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def micro_batches(batch: Indices, lengths: NDArray[np.int32], micro_batch_size: int) -> list[Indices]:
    """A global batch cut into micro batches of similar length, longest first.

    Neighbours in length waste the least padding, and micro batches that follow one another keep ranks that
    work side by side equally busy.
    """
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    return [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]


def share_of_rank(micro: Sequence[Micro], rank: int, world_size: int) -> list[Micro | None]:
    """The micro batches of one rank, `None` where there is nothing left for it.

    Every rank gets the same number, because each one takes part in every collective.
    """
    rounds = -(-len(micro) // world_size)
    slots: list[Micro | None] = [*micro, *[None] * (rounds * world_size - len(micro))]
    return slots[rank::world_size]
