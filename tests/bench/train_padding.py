"""Samples a second of an epoch: FastChat's data path, padded to full length, against ours, packed.

Same model, optimizer and engine, four sequences (ours: four rows at most) a micro batch, one optimizer step
a chunk. FastChat's side is its `make_supervised_data_module` in the recommended lazy mode behind a
DataLoader, and the model called as transformers' Trainer calls it; ours is cutting, packing and collating by
the trainer's stepper. Both read the same conversations in the same order. A second measurement gives
FastChat's batches our loss, which computes no logits where nothing is labelled, so that only the data differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from tests.bench.prepare import inputs, silent, templated
from tests.bench.report import Row, at_least, plain
from tests.bench.trainer import Epoch, model_of, prepared, ratio, seconds, stepper_of, write_records
from yuan2_trainer.data.order import epoch_order

HIDDEN, LAYERS = 256, 6
CHUNK = 32
"""Samples of a chunk, which is an optimizer step; the recipe's 128 would take minutes padded."""
MICRO_BATCH = 4
GOALS = {2048: 10.0, 1024: 5.0}


def measure(root: Path, pairs: int) -> list[Row]:
    """Both lengths, one after the other."""
    return [row for length in GOALS for row in _measure_length(root / str(length), length, pairs)]


def _measure_length(root: Path, length: int, pairs: int) -> list[Row]:
    root.mkdir()
    model_directory, records, _ = inputs(root)
    turns = templated(records)
    ours = prepared(write_records(root / "alpaca.json", records), model_directory, root / "store", length)
    stepper = stepper_of(model_of(HIDDEN, LAYERS), ours, root, length)
    Epoch(stepper, CHUNK).step()  # allocations and DeepSpeed's first step
    # From the beginning, as FastChat's side: both sides of a pair take the same samples.
    epoch = Epoch(stepper, CHUNK)
    order = epoch_order(ours.store.conversations, 42, 0).tolist()
    theirs = _fastchat_batches(root, model_directory, turns, length, order)
    padded, fair = [], []
    for _ in range(pairs):
        own = seconds(epoch.step)
        padded.append((seconds(lambda: _step(stepper.engine, theirs, logits=True)), own))
        fair.append((seconds(lambda: _step(stepper.engine, theirs, logits=False)), seconds(epoch.step)))
    own = sorted(second for _, second in [*padded, *fair])[len(padded)]
    gain = ratio(padded)
    return [
        plain(f"epoch of Alpaca at {length}, ours", CHUNK / own, "samples/s"),
        at_least(f"epoch of Alpaca at {length}, times FastChat's data path", gain, "x", GOALS[length]),
        plain(f"  the same, FastChat's batches with our loss ({length})", ratio(fair), "x"),
    ]


def _fastchat_batches(
    root: Path, model: Path, turns: list[dict[str, str]], length: int, order: list[int]
) -> Iterator[dict[str, Any]]:
    """FastChat's batches of an epoch in our order, again and again."""
    from fastchat.train import train_yuan2
    from transformers import LlamaTokenizer, default_data_collator

    tokenizer = LlamaTokenizer(
        str(model / "tokenizer.model"), add_bos_token=False, add_eos_token=False, legacy=True
    )
    tokenizer.model_max_length = length
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens(["<eod>", "<sep>", "<pad>"], special_tokens=True)
    records = [
        {
            "conversations": [
                {"from": "human", "value": one["instruction"]},
                {"from": "gpt", "value": one["output"]},
            ]
        }
        for one in turns
    ]
    arguments = SimpleNamespace(
        data_path=str(write_records(root / "fastchat.json", records)),
        eval_data_path=None,
        lazy_preprocess=True,
        last_response_loss=False,
        split_example_loss=True,
        efficient_loss=False,
    )
    # It prints all conversations for each one of them.
    vars(train_yuan2).update(print=silent, rank0_print=silent)
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
