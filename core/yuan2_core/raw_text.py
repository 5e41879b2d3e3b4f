"""Raw text for continued pretraining: every token is learned, once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yuan2_core.conversation import Spans
from yuan2_core.tokenizer import Yuan2Tokenizer


@dataclass(frozen=True)
class Document:
    """Text that is learned as it stands.

    Attributes:
        text: not empty.
        source: the file it came from.
        record: its number in that file, from 1.
    """

    text: str
    source: str | None = None
    record: int | None = None


def render_document(document: Document, tokenizer: Yuan2Tokenizer, max_length: int) -> list[Spans]:
    """The text and `<eod>` as sequences of at most `max_length` tokens, at least 2.

    Each begins with the token that the one before ended with: a sequence's first token follows nothing and is
    not learned there, so every token but the document's first is learned exactly once.
    """
    ids = np.append(tokenizer.encode_array(document.text, structure=False), np.int32(tokenizer.eod_id))
    firsts = range(0, len(ids) - 1, max_length - 1)
    return [_all_learned(ids[first : first + max_length]) for first in firsts]


def _all_learned(ids: np.ndarray) -> Spans:
    return Spans(ids, np.array([[0, len(ids)]], dtype=np.int32))
