"""The tokenizer and the chat template against `yuan2_core`, which renders what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.published import PUBLISHED, published_tokenizer
from tests.vllm.engines import ROOT
from yuan2_core.conversation import IGNORED, render_prompt
from yuan2_core.tokenizer import Yuan2Tokenizer as OurTokenizer
from yuan2_core.tokenizer import train_tokenizer

GOLDEN: dict[str, Any] = json.loads((ROOT / "tests/golden/render.json").read_text(encoding="utf-8"))
CONFIG = {"model_type": "yuan", "architectures": ["YuanForCausalLM"]}
LIKE_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
}
"""tokenizer_config.json as published directories have it."""
PIECES = st.sampled_from(
    [
        "<sep>",
        "<eod>",
        "<pad>",
        "<mask>",
        "<FIM_PREFIX>",
        "<n>",
        " ",
        "  ",
        "\n",
        "\t",
        "你好",
        "，",
        "源",
        "a",
        "Who is",
        "<",
        ">",
        "\u2581",
        "😀",
        "\ue000",
        "1",
        "<0x0A>",
        "<s>",
    ]
)
PUBLISHED_TOKENS = 134958
Pair = tuple[Any, OurTokenizer]
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)


def load(directory: Path) -> Any:
    """As vLLM does, by the directory alone."""
    from transformers import AutoTokenizer

    from yuan2_vllm import register

    register()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module", params=["trained", *PUBLISHED])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Theirs, read from a directory by transformers, and ours."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":  # a directory as our exports write it
        ours = train_tokenizer(["Who are you? 你是谁？ I am Yuan.", "the man  in the garden"], 420, directory)
        return load(directory), ours
    ours = published_tokenizer()
    (directory / "tokenizer.model").write_bytes(ours.model_bytes)
    (directory / "tokenizer_config.json").write_text(json.dumps(LIKE_LLAMA))
    return load(directory), ours


def openai(case: dict[str, Any]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    system = [{"role": "system", "content": case["system"]}] if case["system"] else []
    return [*system, *({"role": roles[m["from"]], "content": m["value"]} for m in case["conversations"][:-1])]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]])
def test_golden_conversations(case: dict[str, Any], pair: Pair) -> None:
    theirs, ours = pair
    messages = openai(case)
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(messages, ours)
    if ours.vocab_size == PUBLISHED_TOKENS:
        expected = case["expected"]["last_response"][0]
        answer = next(place for place, label in enumerate(expected["labels"]) if label != IGNORED)
        assert prompt == expected["input_ids"][:answer]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(system=TEXTS, parts=st.lists(TEXTS, min_size=1, max_size=5))
def test_any_conversation(system: str, parts: list[str], pair: Pair) -> None:
    """As vLLM's server does it: to text first, then to ids. Typed special tokens do not end a message."""
    parts = parts if len(parts) % 2 else parts[1:]
    parts = [part if place % 2 == 0 or part.strip() else "yes" for place, part in enumerate(parts)]
    roles = ("user", "assistant")
    messages = [
        {"role": "system", "content": system},
        *({"role": roles[i % 2], "content": part} for i, part in enumerate(parts)),
    ]
    if any("<\ue000" in message["content"] for message in messages):
        return  # the template's own mark
    theirs, ours = pair
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.encode(text, add_special_tokens=False) == render_prompt(messages, ours)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=TEXTS)
def test_any_text_there_and_back(text: str, pair: Pair) -> None:
    theirs, ours = pair
    text = text.replace("<\ue000", "<")  # the template's own mark
    ids = theirs.encode(text)
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)


def test_every_token_has_its_own_text(pair: Pair) -> None:
    theirs, ours = pair
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.sep_token_id) == (ours.eod_id, ours.sep_id)
    assert {text: theirs.get_vocab()[text] for text in ours.special_ids} == ours.special_ids
    assert theirs.decode([ours.vocab_size + 1]) == ours.decode([ours.vocab_size + 1]) == ""


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "system", "content": "a"}], "the last message must be the user's"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the last message must be",
        ),
        ([{"role": "user", "content": "a"}] * 2, "must take turns"),
        (
            [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", " "), ("user", "b"))],
            "empty answer",
        ),
    ],
)
def test_messages_that_cannot_be_rendered(messages: list[dict[str, str]], sentence: str, pair: Pair) -> None:
    with pytest.raises(Exception, match=sentence):
        pair[0].apply_chat_template(messages, tokenize=False)


def test_tools_are_refused(pair: Pair) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(Exception, match="not trained to call tools"):
        pair[0].apply_chat_template([{"role": "user", "content": "a"}], tools=[tool], tokenize=False)


def test_a_directory_may_bring_its_own_template(tmp_path: Path) -> None:
    train_tokenizer(["Who are you?"], 300, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert load(tmp_path).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_answers_stream_as_they_decode(pair: Pair) -> None:
    """vLLM joins pieces behind the prompt: there is no dummy space in front, no character cut in half."""
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    theirs, ours = pair
    for answer in ("你好，我是源。", "I am  Yuan\n", "😀龘", " two"):
        ids = ours.encode("Who<n>are you?<sep>") + ours.encode(answer) + [ours.eod_id]
        start = len(ids) - len(ours.encode(answer)) - 1
        said, tokens, prefix, offset = "", None, 0, 0
        for end in range(start + 1, len(ids) + 1):
            new, text, prefix, offset = detokenize_incrementally(
                theirs, ids[:end], tokens, prefix, offset, skip_special_tokens=True
            )
            tokens = [*(tokens or []), *new]
            said += text
        assert said == answer
