"""Rendered conversations against stored sequences, and against sequences that a reader can check by eye."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from yuan2_core.contract import LossMode
from yuan2_core.conversation import IGNORED, Conversation, render, render_prompt
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
GOLDEN: dict[str, Any] = json.loads((HERE / "render.json").read_text(encoding="utf-8"))
PUBLISHED = PROJECT / os.environ.get("YUAN2_SHARED_DATA", "../shared/data") / "yuan2-tokenizer.model"
MODES: tuple[LossMode, ...] = ("efficient", "last_response", "split_example")
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]


@pytest.fixture(scope="module")
def published() -> Yuan2Tokenizer:
    if not PUBLISHED.exists():
        pytest.skip(f"the published tokenizer is not at {PUBLISHED}; set YUAN2_SHARED_DATA")
    return Yuan2Tokenizer.from_pretrained(PUBLISHED)


@pytest.mark.parametrize("loss", MODES)
@pytest.mark.parametrize("case", CASES)
def test_sequences_equal_the_stored_ones(
    case: dict[str, Any], loss: LossMode, published: Yuan2Tokenizer
) -> None:
    conversation = Conversation(case["conversations"], case["system"])
    found = [(item.input_ids, item.labels) for item in render(conversation, published, loss)]
    assert found == [(item["input_ids"], item["labels"]) for item in case["expected"][loss]]


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_stored_sequence_up_to_the_answer(
    case: dict[str, Any], published: Yuan2Tokenizer
) -> None:
    system = [{"role": "system", "content": case["system"]}] if case["system"] else []
    prompt = render_prompt([*system, *_openai(case["conversations"][:-1])], published)
    expected = case["expected"]["last_response"][0]
    answer = expected["labels"].index(next(label for label in expected["labels"] if label != IGNORED))
    assert prompt == expected["input_ids"][:answer]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    """A tokenizer whose every token is one character: no room is left for merges."""
    alphabet = "abcdefghijklmnopqrstuvwxyz?!.你好"
    controls, byte_pieces, special, space_and_brackets = 3, 256, 16, 3
    size = controls + byte_pieces + special + space_and_brackets + len(alphabet)
    return train_tokenizer([alphabet + " "], size, tmp_path_factory.mktemp("letters"))


BY_EYE = [
    ("efficient", ["·hi?<n>[好.]<n>who?¶·[me!]¶"]),
    ("last_response", ["·hi?<n>好.<n>who?¶·[me!]¶"]),
    ("split_example", ["·hi?¶·[好.]¶", "·hi?<n>好.<n>who?¶·[me!]¶"]),
]
"""What to expect of hi? 好. who? me!: `·` is the dummy space, `¶` is `<sep>` and, last, `<eod>`; what stands
in brackets is learned, as is the dummy space of the answer after `<sep>` and its `<eod>`."""


@pytest.mark.parametrize(("loss", "expected"), BY_EYE)
def test_sequences_of_single_letters_are_as_written_here(
    loss: LossMode, expected: list[str], letters: Yuan2Tokenizer
) -> None:
    messages = [
        {"from": "human", "value": "hi?"},
        {"from": "gpt", "value": "好."},
        {"from": "human", "value": "who?"},
        {"from": "gpt", "value": "me!"},
    ]
    sequences = render(Conversation(messages), letters, loss)
    assert [_drawn(item.input_ids, item.labels, letters) for item in sequences] == expected


def _drawn(ids: list[int], labels: list[int], tokenizer: Yuan2Tokenizer) -> str:
    """A sequence as `BY_EYE` writes it; the learned dummy space and `<eod>` are asserted here."""
    drawn, learning = "", False
    after_sep = ids.index(tokenizer.sep_id) + 1
    assert labels[after_sep] == ids[after_sep]
    assert labels[-1] == ids[-1] == tokenizer.eod_id
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        learned = label != IGNORED and position not in (after_sep, len(ids) - 1)
        if learned != learning:
            drawn += "[" if learned else "]"
            learning = learned
        drawn += _sign(token, tokenizer)
    return drawn


def _sign(token: int, tokenizer: Yuan2Tokenizer) -> str:
    if token in (tokenizer.sep_id, tokenizer.eod_id):
        return "¶"
    text = tokenizer.piece_bytes(token).decode()
    assert len(text) == 1
    return "·" if text == " " else text


def _openai(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[message["from"]], "content": message["value"]} for message in messages]
