"""Samples a second of an epoch: FastChat's data path, padded to full length, against ours, packed.

Same model, optimizer and engine, four sequences (ours: four rows at most) a micro batch, one optimizer step
a chunk. FastChat's side is its `make_supervised_data_module` in the recommended lazy mode behind a
DataLoader, and the model called as transformers' Trainer calls it; ours is cutting, packing and collating by
the trainer's stepper. Both read the same file, and each chunk has short and long samples as the epoch has
them. Besides, FastChat's batches with our loss, which computes no logits where nothing is labelled, so that
only the data differ; and questions without Alpaca's prompt around them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from tests.bench.prepare import fastchat_recipe, inputs, record, templated
from tests.bench.report import Row, at_least, plain
from tests.bench.trainer import Epoch, model_of, prepared, ratio, seconds, stepper_of, write_records

HIDDEN, LAYERS = 256, 6
CHUNK = 32
"""Samples of a chunk, which is an optimizer step; the recipe's 128 would take minutes padded."""
MICRO_BATCH = 4
GOALS = {2048: 10.0, 1024: 5.0}
Turns = list[dict[str, str]]


def measure(root: Path, pairs: int) -> list[Row]:
    """Both lengths with Alpaca's prompt, and both without."""
    model, records, _ = inputs(root)
    rows = []
    for length, goal in GOALS.items():
        sides = _Sides(root / f"prompt-{length}", model, templated(records), length)
        gain = ratio(sides.times(pairs, logits=True))
        fair = ratio(sides.times(pairs, logits=False))
        rows += [
            plain(f"epoch of Alpaca at {length}, ours", sides.rate(), "samples/s"),
            at_least(f"epoch of Alpaca at {length}, times FastChat's data path", gain, "x", goal),
            plain(f"  the same, FastChat's batches with our loss ({length})", fair, "x"),
        ]
    for length, goal in GOALS.items():
        sides = _Sides(root / f"bare-{length}", model, bare(records), length)
        gain = ratio(sides.times(pairs, logits=True))
        rows.append(at_least(f"  the same, without Alpaca's prompt ({length})", gain, "x", goal))
    return rows


def bare(records: Turns) -> Turns:
    """Records with no more than their input behind the instruction."""
    return [
        {"instruction": "\n".join(filter(None, (one["instruction"], one["input"]))), "output": one["output"]}
        for one in records
    ]


class _Sides:
    """Both sides over the same conversations, ready to go."""

    def __init__(self, root: Path, model: Path, turns: Turns, length: int) -> None:
        root.mkdir()
        records = [record([(turn["instruction"], turn["output"])]) for turn in turns]
        path = write_records(root / "data.json", records)
        ours = prepared(path, model, root / "store", length)
        stepper = stepper_of(model_of(HIDDEN, LAYERS), ours, root, length)
        order = representative(ours.store.lengths)
        Epoch(stepper, CHUNK, order).step()  # allocations and DeepSpeed's first step
        self._epoch = Epoch(stepper, CHUNK, order)
        self._theirs = _fastchat_batches(path, model, length, order.tolist())
        self._own: list[float] = []

    def times(self, pairs: int, logits: bool) -> list[tuple[float, float]]:
        """Seconds of FastChat's side and of ours, for the same chunks."""
        found, engine = [], self._epoch.stepper.engine
        for _ in range(pairs):
            own = seconds(self._epoch.step)
            self._own.append(own)
            found.append((seconds(lambda: _step(engine, self._theirs, logits)), own))
        return found

    def rate(self) -> float:
        """Our samples a second."""
        return CHUNK / statistics.median(self._own)


def representative(lengths: np.ndarray) -> np.ndarray:
    """All samples (but a chunk's remainder) in chunks that each have every length in its proportion."""
    chunks = len(lengths) // CHUNK
    by_length = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(lengths) - 1, chunks * CHUNK).round().astype(int)
    ranked = by_length[places].reshape(CHUNK, chunks)
    ranked[1::2] = ranked[1::2, ::-1].copy()  # there and back, so that no chunk has the longer one each time
    return ranked.T.ravel()


def _fastchat_batches(path: Path, model: Path, length: int, order: list[int]) -> Iterator[dict[str, Any]]:
    """FastChat's batches of a file in our order, again and again."""
    from transformers import default_data_collator

    train_yuan2, tokenizer = fastchat_recipe(model, length)
    arguments = SimpleNamespace(
        data_path=str(path),
        eval_data_path=None,
        lazy_preprocess=True,
        last_response_loss=False,
        split_example_loss=True,
        efficient_loss=False,
    )
    data = train_yuan2.make_supervised_data_module(tokenizer, arguments)["train_dataset"]
    loader = DataLoader(Subset(data, order), MICRO_BATCH, collate_fn=default_data_collator)
    while True:
        data.cached_data_dict.clear()  # of a first epoch
        yield from (batch for batch in loader if len(batch["labels"]) == MICRO_BATCH)


def _step(engine: Any, batches: Iterator[dict[str, Any]], logits: bool) -> None:
    """An optimizer step as transformers' Trainer does it with accumulation."""
    micro = CHUNK // MICRO_BATCH
    for number in range(1, micro + 1):
        engine.set_gradient_accumulation_boundary(number == micro)
        batch = next(batches)
        loss: torch.Tensor = engine(**batch, use_cache=False, return_logits=logits).loss
        engine.backward(loss)
    engine.step()
