"""Reads, checks and renders the whole data set before any device is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from yuan2_core.contract import DatasetLocation, Training
from yuan2_core.conversation import Conversation, render, sequence_count
from yuan2_core.errors import DatasetError
from yuan2_core.formats import read_dataset
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.store import SampleStore, fingerprint, write_store

Beat = Callable[[], None]
"""Called for every conversation: raises when the preparation is no longer wanted."""


class Prepared(BaseModel):
    """Facts about the prepared data."""

    samples: int
    dropped_samples: int
    """Records refused and sequences left without a label."""
    longest: int
    """Tokens of the longest sequence."""
    tokens: int
    fingerprint: str
    pad_id: int


def prepare(
    location: DatasetLocation, training: Training, tokenizer: Yuan2Tokenizer, target: Path, beat: Beat
) -> Prepared:
    """Render every conversation into a `SampleStore` at `target`.

    Raises:
        DatasetError: too many records cannot be used, or too many sequences have no label left within
        `maxLength`.
    """
    dataset = read_dataset(location.path, location.format, location.max_invalid_fraction)
    write_store(target, _sequences(dataset.conversations, training, tokenizer, beat))
    store = SampleStore.open(target)
    expected = sum(sequence_count(conversation, training.loss) for conversation in dataset.conversations)
    _check_dropped(location, training, expected, len(store))
    return Prepared(
        samples=len(store),
        dropped_samples=expected - len(store) + len(dataset.errors),
        longest=int(store.lengths.max()),
        tokens=int(store.offsets[-1]),
        fingerprint=fingerprint(target),
        pad_id=tokenizer.pad_id,
    )


def _sequences(
    conversations: list[Conversation], training: Training, tokenizer: Yuan2Tokenizer, beat: Beat
) -> Iterator[tuple[list[int], list[int]]]:
    for conversation in conversations:
        beat()
        for rendered in render(conversation, tokenizer, training.loss, training.max_length):
            yield rendered.input_ids, rendered.labels


def _check_dropped(location: DatasetLocation, training: Training, expected: int, kept: int) -> None:
    dropped = expected - kept
    if kept == 0 or dropped > location.max_invalid_fraction * expected:
        raise DatasetError(
            f"{location.path}: {dropped} of {expected} sequences have no answer left within "
            f"training.maxLength {training.max_length}; raise it or dataset.maxInvalidFraction"
        )
