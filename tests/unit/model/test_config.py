"""config.json is read and written back under its published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yuan2_model import ModelFilesError, Yuan2Config
from yuan2_model.dimensions import read_dimensions

from .conftest import make_config

GOLDEN = Path(__file__).parents[2] / "golden" / "yuan2-tiny" / "config.json"


def published() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


def test_published_file_comes_back_as_it_was() -> None:
    extra = {
        "mask_token_id": 77185,
        "sep_token_id": 77185,
        "tokenizer_class": "YuanTokenizer",
        "novel": [1, {"a": 2}],
    }
    document = published() | extra
    assert Yuan2Config.from_dict(dict(document)).published() == document


def test_saved_file_is_the_published_document(tmp_path: Path) -> None:
    Yuan2Config.from_dict(published()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == published()


def test_defaults_are_those_of_the_2b_model() -> None:
    config = Yuan2Config()
    assert config.dimensions().parameters == 2_088_724_480
    assert (config.eod_token, config.pad_token_id, config.eos_token_id) == (77185, 77185, 77185)
    assert config.published()["architectures"] == ["YuanForCausalLM"]
    assert "auto_map" not in config.published()


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "parameters"),
    [(8192, 42, 64, 51_842_105_344), (8192, 84, 64, 102_577_954_816)],
    ids=["51B", "102B"],
)
def test_parameters_of_the_larger_models(hidden: int, layers: int, heads: int, parameters: int) -> None:
    config = Yuan2Config(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )
    assert config.dimensions().parameters == parameters
    assert config.model_max_length == 4096


def test_special_tokens_follow_eod_unless_given() -> None:
    assert make_config(eod_token=7).pad_token_id == 7
    assert make_config(eod_token=7, pad_token_id=0, eos_token_id=3).published()["pad_token_id"] == 0


def test_model_max_length_alone_gives_the_positions() -> None:
    document = published()
    del document["max_position_embeddings"]
    assert read_dimensions(document).max_position_embeddings == 256
    assert Yuan2Config.from_dict(document).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size must be a positive integer, found None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, found True"),
        ({"num_attention_heads": 5}, "hidden_size 64 over num_attention_heads 5"),
        ({"num_attention_heads": 64}, "even head size"),
        ({"eod_token": 320}, "eod_token 320 lies outside vocab_size 320"),
        ({"eod_token": -1}, "eod_token must be a token id, found -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, found 'yes'"),
        ({"model_type": "llama"}, "model_type is 'llama', but Yuan 2.0 has 'yuan'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but Yuan 2.0 has 'silu'"),
        ({"causal_mask": False}, "causal_mask is False, but Yuan 2.0 has True"),
    ],
)
def test_impossible_fields_are_named_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFilesError) as caught:
        read_dimensions(published() | change, "models/config.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("models/config.json: ")
    assert "\n" not in str(caught.value)


def test_config_object_refuses_what_the_file_may_not_say() -> None:
    with pytest.raises(ModelFilesError, match="hidden_act is 'gelu'"):
        make_config(hidden_act="gelu")
