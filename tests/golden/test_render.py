"""Rendered conversations against stored sequences: as people read them, and as the published ids.

`render-spelled.json` holds what every case becomes under any tokenizer, in letters. It was spelled from the
ids of `render.json`, which are the published code's, and can be checked by eye: `⟦` and `⟧` enclose what is
learned, and the space that SentencePiece puts in front of a text stands where it puts it.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.support.published import PUBLISHED, published_tokenizer
from yuan2_core.conversation import IGNORED, Conversation, Rendered, render, render_prompt
from yuan2_core.sections import LossMode
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

HERE = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((HERE / "render.json").read_text(encoding="utf-8"))
SPELLED: dict[str, Any] = json.loads((HERE / "render-spelled.json").read_text(encoding="utf-8"))
MODES: tuple[LossMode, ...] = ("efficient", "last_response", "split_example")
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]
TEXTS = [message["value"] for case in GOLDEN["cases"] for message in case["conversations"]]


@pytest.fixture(scope="module", params=["letters", "merges", *PUBLISHED])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    """One whose every token is a character, one that merges them, and the published one where it is."""
    if request.param == "published":
        return published_tokenizer()
    return _trained(request.param, tmp_path_factory.mktemp(request.param))


def _trained(name: str, directory: Path) -> Yuan2Tokenizer:
    alphabet = "".join(sorted(set("".join(TEXTS)) - set(" \n")))
    controls, byte_pieces, special, white = 3, 256, 16, 3
    if name == "merges":
        return train_tokenizer(TEXTS * 3, 700, directory)
    without_merges = controls + byte_pieces + special + white + len(alphabet)
    return train_tokenizer([f"{alphabet} \n"], without_merges, directory)


@pytest.mark.parametrize("loss", MODES)
@pytest.mark.parametrize("case", CASES)
def test_sequences_are_those_that_are_spelled_in_the_file(
    case: dict[str, Any], loss: LossMode, tokenizer: Yuan2Tokenizer
) -> None:
    found = render(Conversation(case["conversations"], case["system"]), tokenizer, loss)
    assert found == [_read(text, tokenizer) for text in SPELLED[case["name"]][loss]]


def _read(spelled: str, tokenizer: Yuan2Tokenizer) -> Rendered:
    """A spelled sequence as ids: prompt and answer are each encoded in one piece, and a token that reaches
    over a border counts where its first byte does."""
    prompt, answer = spelled.removesuffix("<eod>⟧").split("<sep>")
    assert answer.startswith("⟦ ")
    marked = re.split("[⟦⟧]", prompt.removeprefix(" "))
    borders = list(accumulate(len(part.encode()) for part in marked))
    ids, starts = tokenizer.encode_spans("".join(marked), structure=False)
    # Behind an odd number of borders a text is learned.
    labels = [
        token if sum(border <= start for border in borders) % 2 else IGNORED
        for token, start in zip(ids, starts, strict=True)
    ]
    learned = [*tokenizer.encode(answer.removeprefix("⟦ "), structure=False), tokenizer.eod_id]
    return Rendered([*ids, tokenizer.sep_id, *learned], [*labels, IGNORED, *learned])


@pytest.mark.parametrize("loss", MODES)
@pytest.mark.parametrize("case", CASES)
def test_letters_spell_the_file(case: dict[str, Any], loss: LossMode, letters: Yuan2Tokenizer) -> None:
    """Token by token, without the encoder that `_read` asks."""
    sequences = render(Conversation(case["conversations"], case["system"]), letters, loss)
    assert [_spell(item, letters) for item in sequences] == SPELLED[case["name"]][loss]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    return _trained("letters", tmp_path_factory.mktemp("letters"))


def _spell(item: Rendered, tokenizer: Yuan2Tokenizer) -> str:
    named = {tokenizer.sep_id: b"<sep>", tokenizer.eod_id: b"<eod>"}
    spelled, learning = b"", False
    for token, label in zip(item.input_ids, item.labels, strict=True):
        assert label in (token, IGNORED)
        if (label != IGNORED) != learning:
            learning = not learning
            spelled += ("⟦" if learning else "⟧").encode()
        spelled += named.get(token) or tokenizer.piece_bytes(token)
    return spelled.decode() + ("⟧" if learning else "")


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_the_sequence_up_to_the_answer(case: dict[str, Any], tokenizer: Yuan2Tokenizer) -> None:
    system = [{"role": "system", "content": case["system"]}] if case["system"] else []
    prompt = render_prompt([*system, *_openai(case["conversations"][:-1])], tokenizer)
    expected = _read(SPELLED[case["name"]]["last_response"][0], tokenizer).input_ids
    assert prompt == expected[: expected.index(tokenizer.sep_id) + 1]


def _openai(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[message["from"]], "content": message["value"]} for message in messages]


if PUBLISHED:

    @pytest.mark.parametrize("loss", MODES)
    @pytest.mark.parametrize("case", CASES)
    def test_published_ids_are_those_of_the_published_code(case: dict[str, Any], loss: LossMode) -> None:
        stored = [Rendered(item["input_ids"], item["labels"]) for item in case["expected"][loss]]
        conversation = Conversation(case["conversations"], case["system"])
        assert render(conversation, published_tokenizer(), loss) == stored
