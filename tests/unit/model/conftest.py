"""A tiny model whose weights are large enough for every path to matter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from yuan2_model import Yuan2Config, Yuan2ForCausalLM, random_model

VOCABULARY = 97


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


def make_config(**changes: object) -> Yuan2Config:
    fields: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "eod_token": 90,
        "sep_token": 91,
        "initializer_range": 0.2,
    }
    return Yuan2Config(**(fields | changes))


@pytest.fixture
def config() -> Yuan2Config:
    return make_config()


@pytest.fixture
def model(config: Yuan2Config) -> Yuan2ForCausalLM:
    return random_model(config, seed=1)


@pytest.fixture
def sequences() -> list[Tensor]:
    """Token ids of five sequences of different lengths, without `<eod>`."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 90, (length,), generator=generator) for length in (9, 1, 14, 2, 6)]
