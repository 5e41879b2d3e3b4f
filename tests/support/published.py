"""The published tokenizer, which is not part of this repository: 2 MB beside it, or named by a variable."""

from __future__ import annotations

import os
from pathlib import Path

from yuan2_core.tokenizer import Yuan2Tokenizer

_NAMED = os.environ.get("YUAN2_SHARED_DATA")
_PATH = Path(__file__).parents[2] / (_NAMED or "../shared/data") / "yuan2-tokenizer.model"

PUBLISHED = ("published",) if _NAMED or _PATH.exists() else ()
"""A parameter of tests that run on several tokenizers. Empty where the file is not there and nobody said
that it is: every such test runs on tokenizers that the tests train, too. `.ci/run` says that it is there."""


def published_tokenizer() -> Yuan2Tokenizer:
    """The tokenizer of Yuan 2.0's published checkpoints. Raises TokenizerError when it is not there."""
    return Yuan2Tokenizer.from_pretrained(_PATH)
