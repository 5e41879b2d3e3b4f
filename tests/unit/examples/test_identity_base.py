"""The base model that examples/identity makes for itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from yuan2_core.conversation import render
from yuan2_core.formats import load_conversations
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import check_model_directory

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/identity"
DATA = EXAMPLE / "conversations.json"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_base", EXAMPLE / "make_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def base(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("identity") / "base"
    assert script.main(["--data", str(DATA), "--out", str(out)]) == 0
    return out


def test_the_base_is_a_small_model_in_the_published_layout(base: Path) -> None:
    facts = check_model_directory(base)
    assert 1_000_000 < facts.dimensions.parameters < 10_000_000
    config = json.loads((base / "config.json").read_text())
    tokenizer = Yuan2Tokenizer.from_pretrained(base)
    assert (config["eod_token"], config["sep_token"]) == (tokenizer.eod_id, tokenizer.sep_id)
    assert config["vocab_size"] >= tokenizer.vocab_size
    assert config["intermediate_size"] == 4 * config["hidden_size"]


def test_every_conversation_fits_into_the_length_of_the_training(base: Path) -> None:
    tokenizer = Yuan2Tokenizer.from_pretrained(base)
    longest = max(
        len(rendered.input_ids)
        for conversation in load_conversations(DATA)
        for rendered in render(conversation, tokenizer, loss="split_example")
    )
    assert longest <= 256


def test_every_message_survives_the_tokenizer(base: Path) -> None:
    tokenizer = Yuan2Tokenizer.from_pretrained(base)
    for conversation in load_conversations(DATA):
        for message in conversation.messages:
            assert tokenizer.decode(tokenizer.encode(message.content)) == message.content


def test_the_same_recipe_gives_the_same_files_and_a_complete_directory_is_left_alone(
    script: ModuleType, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "base"
    arguments = ["--data", str(DATA), "--out", str(again)]
    assert script.main(arguments) == 0
    assert {p.name: p.read_bytes() for p in base.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    made = (again / "config.json").stat().st_mtime_ns
    assert script.main(arguments) == 0
    assert "there already" in capsys.readouterr().out
    assert (again / "config.json").stat().st_mtime_ns == made


def test_another_seed_or_an_incomplete_directory_is_made_anew(
    script: ModuleType, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "base"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert script.main(["--data", str(DATA), "--out", str(out), "--seed", "1"]) == 0
    weights = "model.safetensors"
    assert (out / weights).read_bytes() != (base / weights).read_bytes()
    assert (out / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
