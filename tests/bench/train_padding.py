"""Samples a second: FastChat's data path, padded to full length, against ours, packed.

Same model, optimizer and engine, four sequences (ours: four rows at most) a micro batch, one optimizer step
a chunk, with gradient checkpointing as in the recipe and without. FastChat's side is its lazy data set behind
Trainer's DataLoader, and the model called as Trainer calls it; ours is `prepare`, and the trainer's stepper,
which cuts, packs and collates. Both read the same file, each chunk has short and long samples as the epoch
has them, and both have done a step of that kind before.

What is done once is told apart from what every epoch does. First epoch: FastChat tokenises, and ours counts
`prepare`, a chunk's share of it. Later epochs: FastChat's cache gives what it has seen, and ours reads what
is prepared. (A cache lives in one process: of R ranks, each of which gets other samples in every epoch, it
has seen 1 / R of those of the second epoch. Later epochs here are those of one process, where it has all.)

Besides, FastChat's batches with our loss, which computes no logits where nothing is labelled, so that only
the data differ; and questions without Alpaca's prompt around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.fastchat_side import FastChat, fastchat
from tests.bench.report import Row, at_least, compared
from tests.bench.texts import Records, Texts, bare, in_fastchats_format, templated, write_records
from tests.bench.trainer import Epoch, Sizes, compute_again, model_of, prepared, seconds, stepper_of

SPEED = Sizes(hidden=256, layers=6)
CHUNK = 32
"""Samples of a chunk, which is an optimizer step; the recipe's 128 would take minutes padded."""
MICRO_BATCH = 4
EPOCHS = 3
AGAINST = "FastChat's data path, padded"


@dataclass(frozen=True)
class Length:
    """Of padded rows."""

    tokens: int
    goal: float
    pairs: int
    """Measurements with Alpaca's prompt and the loss of each side."""


@dataclass(frozen=True)
class Pair:
    """Seconds of one chunk on both sides."""

    prepared: float
    """Ours: its share of `prepare`, on as many processes as there are processors."""
    step: float
    """Ours: cutting, packing, collating and the optimizer step."""
    tokenised: float
    """Theirs: fetching it for the first time."""
    cached: float
    """Theirs: fetching it again."""
    padded: float
    """Theirs: the optimizer step."""

    def first(self) -> tuple[float, float]:
        """Ours and theirs in the first epoch."""
        return self.prepared + self.step, self.tokenised + self.padded

    def later(self) -> tuple[float, float]:
        """In one of the others."""
        return self.step, self.cached + self.padded

    def run(self) -> tuple[float, float]:
        """In all of a run, a mean epoch."""
        return _mean(self.first()[0], self.later()[0]), _mean(self.first()[1], self.later()[1])


def _mean(first: float, later: float) -> float:
    return (first + (EPOCHS - 1) * later) / EPOCHS


def lengths(pairs: int, pairs_1024: int) -> tuple[Length, ...]:
    """Those that have a goal."""
    return Length(2048, 10.0, pairs), Length(1024, 5.0, pairs_1024)


def measure(
    root: Path, given: Texts, pairs: int, wanted: Sequence[Length], sizes: Sizes = SPEED
) -> list[Row]:
    """Every length with Alpaca's prompt, checkpointing on and off, and without the prompt."""
    rows = []
    for length in wanted:
        what = f"{sizes}, length {length.tokens:,}, checkpointing"
        prompted = templated(given.alpaca)
        with _sides(root / f"prompt-{length.tokens}", given, prompted, length.tokens, sizes) as sides:
            for again in (True, False):
                found = sides.pairs(length.pairs, again, logits=True)
                rows += _rows(found, length.goal, f"{what} {'on' if again else 'off'}")
            fair = sides.pairs(pairs, again=True, logits=False)
            times = [pair.later() for pair in fair]
            rows.append(_row("later epochs", f"{AGAINST}, with our loss", f"{what} on", times))
    for length in wanted:
        what = f"{sizes}, length {length.tokens:,}, checkpointing on, without Alpaca's prompt"
        with _sides(root / f"bare-{length.tokens}", given, bare(given.alpaca), length.tokens, sizes) as sides:
            times = [pair.later() for pair in sides.pairs(pairs, again=True, logits=True)]
            rows.append(at_least(_row("later epochs", AGAINST, what, times), length.goal))
    return rows


def _rows(pairs: Sequence[Pair], goal: float, sizes: str) -> list[Row]:
    times = {
        "first epoch, preparation included": [pair.first() for pair in pairs],
        "later epochs": [pair.later() for pair in pairs],
        f"all {EPOCHS} epochs of a run": [pair.run() for pair in pairs],
    }
    return [at_least(_row(name, AGAINST, sizes, found), goal) for name, found in times.items()]


def _row(name: str, against: str, sizes: str, times: Sequence[tuple[float, float]]) -> Row:
    return compared(
        name, against, sizes, [(CHUNK / ours, CHUNK / theirs) for ours, theirs in times], "samples/s"
    )


@contextlib.contextmanager
def _sides(root: Path, given: Texts, turns: Records, length: int, sizes: Sizes) -> Iterator[_Sides]:
    """Both sides over the same conversations, ready to go."""
    root.mkdir()
    path = write_records(root / "data.json", in_fastchats_format(turns))
    prepared(path, given.model, root / "warm", length)
    ours = prepared(path, given.model, root / "store", length)
    stepper = stepper_of(model_of(sizes), ours, root, length)
    order = representative(ours.store.lengths)
    share = ours.seconds * CHUNK / len(ours.store)
    with fastchat(path, given.model / "tokenizer.model", length, root) as theirs:
        yield _Sides(Epoch(stepper, CHUNK, order), theirs, share)


@dataclass
class _Sides:
    epoch: Epoch
    theirs: FastChat
    share: float
    """Seconds of `prepare` for a chunk."""

    def pairs(self, count: int, again: bool, logits: bool) -> list[Pair]:
        """Times of so many chunks, after a step of each side that is not counted."""
        engine = self.epoch.stepper.engine
        compute_again(engine.module, again)
        self._pair(engine, logits)
        return [self._pair(engine, logits) for _ in range(count)]

    def _pair(self, engine: Any, logits: bool) -> Pair:
        chunk = self.epoch.batch()
        ours = seconds(lambda: self.epoch.over(chunk))
        tokenised, batches = self._batches(chunk, cached=False)
        cached, _ = self._batches(chunk, cached=True)
        return Pair(self.share, ours, tokenised, cached, seconds(lambda: _step(engine, batches, logits)))

    def _batches(self, chunk: np.ndarray, cached: bool) -> tuple[float, list[dict[str, torch.Tensor]]]:
        return self.theirs.batches(chunk.tolist(), MICRO_BATCH, cached=cached)


def representative(lengths: np.ndarray) -> np.ndarray:
    """All samples (but a chunk's remainder) in chunks that each have every length in its proportion."""
    chunks = len(lengths) // CHUNK
    by_length = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(lengths) - 1, chunks * CHUNK).round().astype(int)
    ranked = by_length[places].reshape(CHUNK, chunks)
    ranked[1::2] = ranked[1::2, ::-1].copy()  # there and back, so that no chunk has the longer one each time
    return ranked.T.ravel()


def _step(engine: Any, batches: Sequence[dict[str, torch.Tensor]], logits: bool) -> None:
    """An optimizer step as transformers' Trainer does it with accumulation."""
    for number, batch in enumerate(batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(batches))
        loss: torch.Tensor = engine(**batch, use_cache=False, return_logits=logits).loss
        engine.backward(loss)
    engine.step()
