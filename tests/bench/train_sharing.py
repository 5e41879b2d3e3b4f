"""`split_example`: the beginning that samples of a conversation share, computed once or with every sample.

Same model, batches and packing; "separately" knows of no conversations, so that every sample lies in the
rows whole. The conversations are FastChat's (or the example's) as they are, and their turns joined to
conversations of `TURNS`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.bench.prepare import TURNS, inputs, record
from tests.bench.report import Row, plain
from tests.bench.trainer import Epoch, model_of, prepared, ratio, seconds, stepper_of, write_records
from yuan2_core.formats import load_conversations
from yuan2_trainer.data.families import families

HIDDEN, LAYERS, LENGTH = 256, 6, 2048
BATCH = 30


def measure(root: Path, pairs: int) -> list[Row]:
    """Short conversations and long ones."""
    root.mkdir()
    model_directory, _, path = inputs(root)
    data = [[(t.question, t.answer) for t in one.turns] for one in load_conversations(path)]
    turns = [turn for conversation in data for turn in conversation]
    joined = [turns[i : i + TURNS] for i in range(0, len(turns) - TURNS + 1, TURNS)]
    rows = []
    for name, conversations in (("as they are", data), (f"of {TURNS} turns", joined)):
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        records = write_records(folder / "data.json", [record(one) for one in conversations])
        rows += _measure(folder, model_directory, records, name, pairs)
    return rows


def _measure(root: Path, model: Path, records: Path, name: str, pairs: int) -> list[Row]:
    ours = prepared(records, model, root / "store", LENGTH, loss="split_example")
    stepper = stepper_of(model_of(HIDDEN, LAYERS), ours, root, LENGTH)
    shared = Epoch(stepper, BATCH)
    strangers = replace(ours.store, conversations=np.arange(len(ours.store), dtype=np.int32))
    alone = Epoch(stepper.over(strangers), BATCH, shared.order)
    shared.step()
    times = []
    for _ in range(pairs):
        separately = seconds(alone.step)
        times.append((separately, seconds(shared.step)))
    everything = np.arange(len(ours.store))
    computed = sum(family.size for family in families(everything, ours.store, LENGTH))
    return [
        plain(f"split_example, conversations {name}: times every sample separately", ratio(times), "x"),
        plain(
            "  tokens of the samples over tokens computed", float(ours.store.lengths.sum()) / computed, "x"
        ),
    ]
