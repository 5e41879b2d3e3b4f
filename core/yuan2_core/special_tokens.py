"""The special tokens of Yuan 2.0: their texts, in the order in which missing ones are added after the pieces.

Source: the tokenizer set-up published with Yuan 2.0; with its model the tokens that are pieces already keep
their ids and the five others become 134953..134957.
"""

from __future__ import annotations

from typing import Final

EOD: Final = "<eod>"
"""Ends an answer, and a document."""
SEP: Final = "<sep>"
"""Ends the prompt; the answer follows."""
PAD: Final = "<pad>"

STRUCTURE: Final = (EOD, SEP, PAD)
"""Tokens that give a sequence its structure. In a message they are ordinary text: else a message could end
its own prompt and answer itself."""

ADDED: Final = ("<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>")
"""Tokens that the published SentencePiece model does not have as pieces."""

MARKERS: Final = (
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
)
"""Markers of code data."""

SPECIAL_TOKENS: Final = (*STRUCTURE, *ADDED, *MARKERS)
"""Every atomic token, in Yuan 2.0's own order."""

PIECES: Final = (*STRUCTURE, *MARKERS)
"""Special tokens that are pieces of the published SentencePiece model."""
