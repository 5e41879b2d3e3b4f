"""The one exception a user of the demo sees."""

from __future__ import annotations


class DemoError(Exception):
    """What went wrong in one sentence, and a command that shows more."""

    def __init__(self, sentence: str, look: str = "") -> None:
        super().__init__(sentence)
        self.look = look
        """A command to run next; empty when the sentence says it all."""
