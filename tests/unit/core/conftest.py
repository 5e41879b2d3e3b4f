"""A small tokenizer with Yuan 2.0's special tokens, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

CORPUS = [
    "Who are you? I am Yuan, a large language model. What can you do for me today?",
    "你是谁？我是源，一个大语言模型。今天我能帮你做什么？",
    "def greet(name):\n\treturn 'Hello, ' + name  # 12345\n",
    "Neither is hidden: see <n> and the manual > the plan.",
]


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tokenizer with all its files."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS * 3, 500, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Yuan2Tokenizer:
    """The trained tokenizer, as read from its directory."""
    return Yuan2Tokenizer.from_pretrained(tokenizer_directory)
