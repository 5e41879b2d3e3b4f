"""What the demo writes: numbered steps, and one line that lives while something is waited for."""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from typing import TextIO

PLAIN_SECONDS = 15.0
"""Without a terminal, a wait that has nothing new to say repeats itself this seldom."""


def columns(text: str) -> int:
    """Terminal columns of `text`: Chinese characters and emoji take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clip(text: str, width: int) -> str:
    """The beginning of `text` in at most `width` columns, with an ellipsis when something is missing."""
    if columns(text) <= width:
        return text
    kept, used = [], 1
    for char in text:
        used += columns(char)
        if used > width:
            break
        kept.append(char)
    return "".join(kept) + "…"


def seconds(value: float) -> str:
    """A duration as people say it: `8 s`, `2 min 5 s`."""
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class Terminal:
    """Writes to a terminal or to a log; only the former has a line that changes."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._tty = self._stream.isatty()
        self._steps = steps
        self._step = 0
        self._started = time.monotonic()
        self._live = False
        self._last = ("", 0.0)

    def step(self, title: str) -> None:
        """Begin the next numbered step."""
        self._step += 1
        self._started = time.monotonic()
        self._last = ("", 0.0)
        self.line(f"[{self._step}/{self._steps}] {title}")

    def done(self, text: str) -> None:
        """End a step with what came out of it and how long it took."""
        self.line(f"      {text} ({seconds(time.monotonic() - self._started)})")

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def live(self, text: str, key: str | None = None) -> None:
        """Show the state of a wait: in place on a terminal, else when `key` (default: the text) changed."""
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[2K" + clip(f"      {text}", width))
            self._stream.flush()
            self._live = True
            return
        key, now = text if key is None else key, time.monotonic()
        if key != self._last[0] or now - self._last[1] >= PLAIN_SECONDS:
            self._last = (key, now)
            self.line(f"      {text}")

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._live = False
