"""`split_example`: the beginning that samples of a conversation share, computed once or with every sample.

Same model, batches and packing; "separately" knows of no conversations, so that every sample lies in the
rows whole. The conversations are FastChat's (or the example's) as they are, and their turns joined to
conversations of `TURNS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.bench.fastchat_side import record
from tests.bench.report import Row, compared, plain
from tests.bench.texts import TURNS, Texts, write_records
from tests.bench.train_padding import SPEED
from tests.bench.trainer import Epoch, Sizes, model_of, prepared, seconds, stepper_of
from yuan2_core.formats import load_conversations
from yuan2_trainer.data.families import families

LENGTH = 2048
BATCH = 30
Conversation = Sequence[tuple[str, str]]


def measure(root: Path, given: Texts, pairs: int, sizes: Sizes = SPEED, batch: int = BATCH) -> list[Row]:
    """Short conversations and long ones."""
    root.mkdir()
    data = [[(t.question, t.answer) for t in one.turns] for one in load_conversations(given.conversations)]
    turns = given.turns()
    joined = [turns[i : i + TURNS] for i in range(0, len(turns) - TURNS + 1, TURNS)]
    most = max(len(one) for one in data)
    cases: dict[str, Sequence[Conversation]] = {f"1 to {most} turns": data, f"{TURNS} turns": joined}
    rows = []
    for name, conversations in cases.items():
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        records = write_records(folder / "data.json", [record(one) for one in conversations])
        what = f"{sizes}, {len(conversations)} conversations of {name}, {batch} samples a step"
        rows += _measure(folder, given.model, records, what, pairs, sizes, batch)
    return rows


def _measure(
    root: Path, model: Path, records: Path, what: str, pairs: int, sizes: Sizes, batch: int
) -> list[Row]:
    ours = prepared(records, model, root / "store", LENGTH, loss="split_example")
    stepper = stepper_of(model_of(sizes), ours, root, LENGTH)
    shared = Epoch(stepper, batch)
    strangers = replace(ours.store, conversations=np.arange(len(ours.store), dtype=np.int32))
    alone = Epoch(stepper.over(strangers), batch, shared.order)
    shared.step()
    alone.step()
    rates = []
    for _ in range(pairs):
        separately = batch / seconds(alone.step)
        rates.append((batch / seconds(shared.step), separately))
    everything = np.arange(len(ours.store))
    computed = sum(family.size for family in families(everything, ours.store, LENGTH))
    against = "every sample by itself, packed too"
    fewer = float(ours.store.lengths.sum()) / computed
    return [
        compared("`split_example`, beginnings shared", against, what, rates, "samples/s"),
        plain("tokens of the samples over tokens computed", fewer, "x", what),
    ]
