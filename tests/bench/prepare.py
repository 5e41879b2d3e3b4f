"""Preparation, from conversations to packed token files, against FastChat's own.

`python -m tests.bench.prepare`. With the shared data: Alpaca's 999 records for FastChat, and for ours 52
times as many, the words of each copy in another order, so that no sentence comes twice. Without them: the
words of `examples/identity`. Ours is all of `prepare`: reading, checking, hashing, rendering, writing,
syncing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bench.report import Row, at_least, at_most, plain, write
from yuan2_core.contract import DatasetLocation, Training
from yuan2_core.conversation import Conversation, render_spans
from yuan2_core.formats import load_conversations
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data.packing import pack
from yuan2_trainer.data.prepare import prepare
from yuan2_trainer.data.store import SampleStore

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / os.environ.get("YUAN2_SHARED_DATA", "../shared/data")
MAX_LENGTH = 2048
TURNS = 10
"""Of a conversation in the comparison of `split_example`."""
COPIES = 52
"""Of 999 records: about the 52,002 of the whole Alpaca."""


def main() -> None:
    """Measure and write build/bench/prepare.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default %(default)s)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, records, turns = inputs(root)
        tokenizer = Yuan2Tokenizer.from_pretrained(model)
        large = root / "large.json"
        large.write_text(json.dumps(shuffled(records, COPIES), ensure_ascii=False), encoding="utf-8")
        theirs = fastchat(model, records)
        bare = sentencepiece(tokenizer, records)
        times: dict[str, list[float]] = {"theirs": [], "bare": [], "ours": []}
        for _ in range(rounds):  # in turns, so that a busy moment of the machine meets all of them
            times["theirs"].append(seconds(theirs))
            times["bare"].append(seconds(bare))
            times["ours"].append(seconds(lambda: ours(large, tokenizer, root)))
        middle = {name: statistics.median(values) for name, values in times.items()}
        write("prepare", [*rows(middle, len(records)), fill(root), *multi_turn(turns, tokenizer, rounds)])


def rows(middle: dict[str, float], count: int) -> list[Row]:
    """The numbers of the median times."""
    theirs, ours_ = count / middle["theirs"], COPIES * count / middle["ours"]
    return [
        plain("FastChat's preprocess, slow tokenizer", theirs, "samples/s"),
        plain("bare sentencepiece, one thread", count / middle["bare"], "samples/s"),
        plain("prepare, all processors", ours_, "samples/s"),
        at_least("prepare, times FastChat's preprocess", ours_ / theirs, "x", 8),
        at_most(f"prepare {COPIES * count} Alpaca samples", middle["ours"], "s", 12),
    ]


def fill(root: Path) -> Row:
    """How full the packer's rows are."""
    sizes = SampleStore.open(root / "store").lengths.tolist()[:20000]
    return at_least(
        "fill of packed rows of 2048", sum(sizes) / (MAX_LENGTH * len(pack(sizes, MAX_LENGTH))), "", 0.98
    )


def multi_turn(path: Path, tokenizer: Yuan2Tokenizer, rounds: int) -> list[Row]:
    """`split_example` with shared prompts against every sample by itself."""
    turns = [turn for conversation in load_conversations(path) for turn in conversation.turns]
    data = [Conversation.of_turns(turns[i : i + TURNS]) for i in range(0, len(turns) - TURNS, TURNS)]

    def shared() -> None:
        for conversation in data:
            render_spans(conversation, tokenizer, "split_example", MAX_LENGTH)

    def separately() -> None:
        encode = tokenizer._processor.encode
        for conversation in data:
            for end in range(1, len(conversation.turns) + 1):
                *before, last = conversation.turns[:end]
                encode("<n>".join([part for turn in before for part in turn] + [last.question]))
                encode(last.answer)

    count = sum(len(conversation.turns) for conversation in data)
    rates = [count / statistics.median(seconds(run) for _ in range(rounds)) for run in (shared, separately)]
    return [
        plain(f"split_example of {TURNS} turns, one process", rates[0], "samples/s"),
        plain("bare sentencepiece for each of its samples", rates[1], "samples/s"),
    ]


def inputs(root: Path) -> tuple[Path, list[dict[str, str]], Path]:
    """A tokenizer directory, Alpaca records, and a file of multi-turn conversations."""
    model, identity = root / "model", ROOT / "examples/identity/conversations.json"
    if (SHARED / "alpaca_en.json").exists():
        Yuan2Tokenizer.from_pretrained(SHARED / "yuan2-tokenizer.model").save_pretrained(model)
        records = json.loads((SHARED / "alpaca_en.json").read_text(encoding="utf-8"))
        return model, records, SHARED / "fastchat_dummy_conversation.json"
    data = load_conversations(identity)
    words = " ".join(part for one in data for turn in one.turns for part in turn).split()
    train_tokenizer([" ".join(words)], 2000, model)
    choose = random.Random(0)

    def text(size: int) -> str:
        return " ".join(choose.choices(words, k=size))

    records = [
        {"instruction": text(12), "input": "", "output": text(choose.randint(5, 150))} for _ in range(999)
    ]
    return model, records, identity


def shuffled(records: list[dict[str, str]], copies: int) -> list[dict[str, str]]:
    """Every record so many times, its words in another order each time."""
    choose = random.Random(0)

    def another(text: str) -> str:
        words = text.split(" ")
        choose.shuffle(words)
        return " ".join(words) if not " ".join(words).isspace() else text

    return [{name: another(text) for name, text in one.items()} for _ in range(copies) for one in records]


def fastchat(model: Path, records: list[dict[str, str]]) -> Callable[[], Any]:
    """FastChat's preprocess over all records, as its recipe calls it."""
    train_yuan2, tokenizer = fastchat_recipe(model, MAX_LENGTH)
    sources = [record([(one["instruction"], one["output"])])["conversations"] for one in templated(records)]
    arguments = SimpleNamespace(last_response_loss=False, split_example_loss=True, efficient_loss=False)
    return lambda: train_yuan2.preprocess(sources, tokenizer, arguments)


def fastchat_recipe(model: Path, max_length: int) -> tuple[Any, Any]:
    """FastChat's module `train_yuan2`, its prints silenced, and the slow tokenizer as it sets that up."""
    from fastchat.train import train_yuan2
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer(
        str(model / "tokenizer.model"), add_bos_token=False, add_eos_token=False, legacy=True
    )
    tokenizer.model_max_length = max_length
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens(["<eod>", "<sep>", "<pad>"], special_tokens=True)
    # It prints all conversations for each one of them, which would take most of the time.
    vars(train_yuan2).update(print=silent, rank0_print=silent)
    return train_yuan2, tokenizer


def record(turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A FastChat record of questions and answers."""
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "", "conversations": messages}


def silent(*_: object) -> None:
    """A print that prints nothing."""


def sentencepiece(tokenizer: Yuan2Tokenizer, records: list[dict[str, str]]) -> Callable[[], Any]:
    """The SentencePiece model alone, over questions and answers."""
    texts = [text for one in templated(records) for text in (one["instruction"], one["output"])]
    return lambda: [tokenizer._processor.encode(text) for text in texts]


def templated(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Records with Alpaca's prompt as their instruction."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        turns = [conversation.turns[0] for conversation in load_conversations(path, "alpaca")]
    return [{"instruction": turn.question, "output": turn.answer} for turn in turns]


def ours(path: Path, tokenizer: Yuan2Tokenizer, root: Path) -> None:
    """One cold preparation."""
    training = Training(max_length=MAX_LENGTH)
    (root / "store").unlink(missing_ok=True)
    cache = Path(tempfile.mkdtemp(dir=root))
    prepare(DatasetLocation(path=str(path)), training, tokenizer, root / "store", lambda: None, cache)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
