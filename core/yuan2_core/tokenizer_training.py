"""Training of small SentencePiece models with the settings of the published Yuan 2.0 tokenizer."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import sentencepiece

from yuan2_core.sentencepiece_model import append_pieces
from yuan2_core.special_tokens import ADDED, PIECES, SPECIAL_TOKENS

_BREAKS: Final = str.maketrans(dict.fromkeys("<>\t\r\u2581", "\n"))
"""Where a training text is cut. No piece may hold < or > beside another character: then no merge can spell
a special token, and its text stays text unless the tokenizer itself cuts it out. Tabs and line ends are
bytes, as published."""

_SPECIAL: Final = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

_LONGEST_LINE: Final = 4000
"""Characters; SentencePiece leaves out lines above `max_sentence_length` bytes (4192 as published)."""


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE model and append the special tokens that are pieces in the published one.

    Args:
        texts: training text.
        vocab_size: most ids, added tokens included.

    Returns:
        The serialized model.

    Raises:
        ValueError: no text, or `vocab_size` is below what bytes, characters and special tokens need.
    """
    lines = list(_lines(texts))
    if not lines:
        raise ValueError("a tokenizer cannot be trained without text")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            vocab_size=vocab_size - len(PIECES) - len(ADDED),
            **_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} is too small for these texts: {error}") from error
    return append_pieces(writer.getvalue(), PIECES)


_SETTINGS: Final[dict[str, Any]] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.99995,
    "required_chars": "<>",
    "hard_vocab_limit": False,
    "max_sentence_length": 4 * _LONGEST_LINE,
    "num_threads": 1,
    "minloglevel": 2,
}


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in _SPECIAL.sub("\n", text).translate(_BREAKS).split("\n"):
            yield from (line[i : i + _LONGEST_LINE] for i in range(0, len(line), _LONGEST_LINE))
