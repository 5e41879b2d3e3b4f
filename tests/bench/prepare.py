"""`make bench-prepare`: from conversations to what a rank reads, against FastChat's own tokenisation.

Both sides get the same texts. Ours is all of `prepare` on all processors: reading, checking, hashing,
rendering, writing, syncing. FastChat's is what its lazy data set does for a sample, in one process, as a rank
does it; without reading the file. Its rate does not depend on how many samples there are, so of the many
copies it gets some.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.fastchat_side import FastChat, fastchat
from tests.bench.fill import measure as fill
from tests.bench.report import Report, Row, at_least, at_most, compared, options, plain
from tests.bench.texts import TURNS, Texts, in_fastchats_format, shuffled, templated, texts, write_records
from yuan2_core.contract import DatasetLocation
from yuan2_core.conversation import Conversation, render_spans
from yuan2_core.formats import load_conversations
from yuan2_core.processors import available_cpus
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer

MAX_LENGTH = 2048
COPIES = 52
"""Of 999 records: about the 52,002 of the whole Alpaca."""
SOME = 2000
"""Of the copies, for FastChat: spread evenly over them."""


def main() -> None:
    """Measure and write build/bench/prepare.json."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default %(default)s)")
    arguments = parser.parse_args()
    report = Report("prepare", arguments)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        given = texts(root)
        if arguments.small:
            rows = measure(root, given.few(40), 1, copies=3, some=20, batch=16)
        else:
            rows = measure(root, given, arguments.rounds)
    report.write(rows)


def measure(
    root: Path, given: Texts, rounds: int, copies: int = COPIES, some: int = SOME, batch: int = 128
) -> list[Row]:
    """Preparation, and what the trainer makes of what was prepared.

    Args:
        root: an empty directory.
        given: texts.
        rounds: measurements of each.
        copies: of each record.
        some: copies that FastChat gets.
        batch: samples of the global batches whose fill is told.
    """
    tokenizer = Yuan2Tokenizer.from_pretrained(given.model)
    many = shuffled(given.alpaca, copies)
    rows = [
        *_single_turn(root / "copies", given, many, some, rounds),
        *_single_turn(root / "once", given, given.alpaca, len(given.alpaca), rounds),
    ]
    goals = {0: lambda row: at_least(row, 8), 1: lambda row: at_most(row, 12)}
    rows = [goals[number](row) if number in goals else row for number, row in enumerate(rows)]
    return [*rows, *_multi_turn(given, tokenizer, rounds), *fill(root / "copies" / "store", batch)]


def _single_turn(root: Path, given: Texts, records: Any, some: int, rounds: int) -> list[Row]:
    """The records on both sides, and the SentencePiece model alone; in turns."""
    root.mkdir()
    path = write_records(root / "alpaca.json", records)
    prompted = templated(records)
    tokenizer = Yuan2Tokenizer.from_pretrained(given.model)
    step = max(1, len(records) // some)
    chosen = prompted[::step]
    theirs = write_records(root / "fastchat.json", in_fastchats_format(chosen))
    sides: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    took = []
    with fastchat(theirs, given.model / "tokenizer.model", MAX_LENGTH, root) as other:
        for _ in range(rounds):
            took.append(seconds(lambda: prepared(path, tokenizer, root)))
            rate = len(records) / took[-1]
            sides.append((rate, _rate(other, len(chosen))))
            alone.append((rate, len(chosen) / seconds(sentencepiece(tokenizer, chosen))))
    sizes = f"{len(records):,} samples of {given.name}, ours on {available_cpus()} processes at most"
    return [
        compared("preparation", "FastChat's tokenisation, one process", sizes, sides, "samples/s"),
        plain("preparation, its time", statistics.median(took), "s", sizes),
        compared("preparation", "SentencePiece alone, one process", sizes, alone, "samples/s"),
    ]


def _rate(side: FastChat, count: int) -> float:
    return count / side.tokenise(range(count))


def sentencepiece(tokenizer: Yuan2Tokenizer, records: Any) -> Callable[[], Any]:
    """The SentencePiece model alone, over questions and answers."""
    parts = [text for one in records for text in (one["instruction"], one["output"])]
    return lambda: [tokenizer._processor.encode(text) for text in parts]


def prepared(path: Path, tokenizer: Yuan2Tokenizer, root: Path) -> None:
    """One cold preparation, to `root`/store."""
    # Here, so that whoever wants texts alone needs no trainer.
    from yuan2_trainer.data.prepare import prepare

    training = Training(max_length=MAX_LENGTH)
    (root / "store").unlink(missing_ok=True)
    cache = Path(tempfile.mkdtemp(dir=root))
    prepare(DatasetLocation(path=str(path)), training, tokenizer, root / "store", lambda: None, cache)


def _multi_turn(given: Texts, tokenizer: Yuan2Tokenizer, rounds: int) -> list[Row]:
    """`split_example` with shared prompts against every sample by itself."""
    found = load_conversations(given.conversations)
    turns = [turn for conversation in found for turn in conversation.turns]
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
    sides = [(count / seconds(shared), count / seconds(separately)) for _ in range(rounds)]
    sizes = f"{len(data)} conversations of {TURNS} turns, one process"
    against = "SentencePiece alone over each of the samples"
    return [compared("rendering `split_example`", against, sizes, sides, "samples/s")]


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
