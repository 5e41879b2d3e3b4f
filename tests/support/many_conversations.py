"""A file of conversations of any size, written as it grows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

SENTENCE = "wind that moves over the river brings rain to the fields of the north and snow in winter"
_WORDS = SENTENCE.split()
TURNS = 3
DIFFERENT_WORDS = 100_000
"""Of varied texts: half of them of syllables, half of one to three Chinese characters."""
_SYLLABLES = [
    first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er")
]
_CHINESE = (0x4E00, 0x59B7)
"""3,000 characters (Unicode, CJK Unified Ideographs), as many as a newspaper uses."""
Text = Callable[[int, int], str]
"""What is said in a conversation's message."""


def write_conversations(path: Path, count: int, text: Text | None = None) -> None:
    """JSON Lines in FastChat's format: `TURNS` turns each, a kilobyte, no two alike."""
    text = text or rotated
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = [
                {"from": "gpt" if turn % 2 else "human", "value": text(number, turn)}
                for turn in range(2 * TURNS)
            ]
            record = {"id": str(number), "conversations": messages}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def rotated(number: int, turn: int) -> str:
    """The words of `SENTENCE` from another one on each time."""
    start = (number + 5 * turn) % len(_WORDS)
    return f"{number} " + " ".join((_WORDS[start:] + _WORDS[:start]) * 2)


def varied(seed: int = 0) -> Text:
    """Words drawn by Zipf's law, the n-th of them n times as rarely as the first, in messages of 5 to 60."""
    choose = random.Random(seed)
    words = [_word(choose, chinese=bool(number % 2)) for number in range(DIFFERENT_WORDS)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(number: int, turn: int) -> str:
        return " ".join(choose.choices(words, cum_weights=weights, k=choose.randint(5, 60)))

    return text


def _word(choose: random.Random, chinese: bool) -> str:
    if chinese:
        return "".join(chr(choose.randint(*_CHINESE)) for _ in range(choose.randint(1, 3)))
    return "".join(choose.choices(_SYLLABLES, k=choose.randint(1, 4)))
