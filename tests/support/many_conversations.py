"""A file of conversations of any size, written as it grows."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCE = "wind that moves over the river brings rain to the fields of the north and snow in winter"
_WORDS = SENTENCE.split()
TURNS = 3


def write_conversations(path: Path, count: int) -> None:
    """JSON Lines in FastChat's format: `TURNS` turns each, a kilobyte, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for turn in range(2 * TURNS):
                start = (number + 5 * turn) % len(_WORDS)
                text = f"{number} " + " ".join((_WORDS[start:] + _WORDS[:start]) * 2)
                messages.append({"from": "gpt" if turn % 2 else "human", "value": text})
            file.write(json.dumps({"id": str(number), "conversations": messages}) + "\n")
