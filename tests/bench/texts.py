"""What the benchmarks read: Alpaca's 999 records and FastChat's conversations of the shared data, or, where
those are absent, words of `examples/identity` in records as many and as long."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.fastchat_side import record
from yuan2_core.formats import load_conversations
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / os.environ.get("YUAN2_SHARED_DATA", "../shared/data")
RECORDS = 999
TURNS = 10
"""Of a conversation in the comparisons of `split_example`."""
Records = list[dict[str, str]]


@dataclass(frozen=True)
class Texts:
    """Inputs of a measurement.

    Attributes:
        model: a directory with a tokenizer.
        alpaca: records of one question and one answer.
        conversations: a file of conversations of several turns.
        name: whose they are, for the report.
    """

    model: Path
    alpaca: Records
    conversations: Path
    name: str

    def few(self, count: int) -> Texts:
        """The shortest records only."""
        by_length = sorted(self.alpaca, key=lambda one: sum(map(len, one.values())))
        return replace(self, alpaca=by_length[:count])

    def turns(self) -> list[tuple[str, str]]:
        """Questions and answers of the conversations, one after the other."""
        found = load_conversations(self.conversations)
        return [(turn.question, turn.answer) for conversation in found for turn in conversation.turns]


def texts(root: Path) -> Texts:
    """The shared data, or the project's own; the tokenizer is written below `root`."""
    model, identity = root / "model", ROOT / "examples/identity/conversations.json"
    if (SHARED / "alpaca_en.json").exists():
        Yuan2Tokenizer.from_pretrained(SHARED / "yuan2-tokenizer.model").save_pretrained(model)
        records = json.loads((SHARED / "alpaca_en.json").read_text(encoding="utf-8"))
        return Texts(model, records, SHARED / "fastchat_dummy_conversation.json", "Alpaca")
    data = load_conversations(identity)
    words = " ".join(part for one in data for turn in one.turns for part in turn).split()
    train_tokenizer([" ".join(words)], 2000, model)
    choose = random.Random(0)

    def text(size: int) -> str:
        return " ".join(choose.choices(words, k=size))

    records = [
        {"instruction": text(12), "input": "", "output": text(choose.randint(5, 150))} for _ in range(RECORDS)
    ]
    return Texts(model, records, identity, "words of examples/identity")


def templated(records: Records) -> Records:
    """Records with Alpaca's prompt as their instruction."""
    with tempfile.TemporaryDirectory() as name:
        path = write_records(Path(name) / "data.json", records)
        turns = [conversation.turns[0] for conversation in load_conversations(path, "alpaca")]
    return [{"instruction": turn.question, "output": turn.answer} for turn in turns]


def bare(records: Records) -> Records:
    """Records with no more than their input behind the instruction."""
    return [
        {"instruction": "\n".join(filter(None, (one["instruction"], one["input"]))), "output": one["output"]}
        for one in records
    ]


def shuffled(records: Records, copies: int) -> Records:
    """Every record so many times, its words in another order each time: no sentence comes twice."""
    choose = random.Random(0)

    def another(text: str) -> str:
        words = text.split(" ")
        choose.shuffle(words)
        return " ".join(words) if not " ".join(words).isspace() else text

    return [{name: another(text) for name, text in one.items()} for _ in range(copies) for one in records]


def in_fastchats_format(records: Records) -> list[dict[str, Any]]:
    """Conversations of one turn."""
    return [record([(one["instruction"], one["output"])]) for one in records]


def write_records(path: Path, records: Sequence[Any]) -> Path:
    """A file of records."""
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path
