"""The data set of examples/identity is what the demo needs: enough, bilingual, a function of its prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "examples/identity/conversations.json"
SPECIAL_TOKEN = re.compile(r"<(eod|sep|pad|mask|predict|FIM_\w+|commit_\w+|jupyter_\w+|empty_output)>")


@pytest.fixture(scope="module")
def conversations() -> list[list[str]]:
    """Messages of each conversation, human first."""
    return [[m["value"] for m in record["conversations"]] for record in json.loads(DATA.read_text("utf-8"))]


def is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))


def test_there_are_enough_conversations_in_both_languages(conversations: list[list[str]]) -> None:
    chinese = sum(is_chinese(messages[0]) for messages in conversations)
    assert len(conversations) >= 130
    assert 0.45 <= chinese / len(conversations) <= 0.55


def test_many_conversations_have_two_to_four_turns(conversations: list[list[str]]) -> None:
    turns = [len(messages) // 2 for messages in conversations]
    assert sum(2 <= n <= 4 for n in turns) >= 35
    assert max(turns) == 4


def test_records_are_fastchat_records_with_unique_ids() -> None:
    records = json.loads(DATA.read_text("utf-8"))
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert record.keys() == {"id", "conversations"}
        roles = [message["from"] for message in record["conversations"]]
        assert roles
        assert roles == ["human", "gpt"] * (len(roles) // 2)


def test_no_message_is_empty_padded_or_holds_a_special_token(conversations: list[list[str]]) -> None:
    for message in (m for messages in conversations for m in messages):
        assert message == message.strip() != ""
        assert not SPECIAL_TOKEN.search(message)


def test_the_answer_is_a_function_of_the_rendered_history(conversations: list[list[str]]) -> None:
    answers: dict[str, str] = {}
    for messages in conversations:
        for i in range(1, len(messages), 2):
            history = "<n>".join(messages[:i])
            assert answers.setdefault(history, messages[i]) == messages[i], history


def test_no_conversation_is_given_twice(conversations: list[list[str]]) -> None:
    assert len({tuple(messages) for messages in conversations}) == len(conversations)


def test_the_same_last_question_has_different_answers_after_different_histories(
    conversations: list[list[str]],
) -> None:
    last: dict[str, set[str]] = {}
    for messages in conversations:
        for i in range(3, len(messages), 2):
            last.setdefault(messages[i - 1], set()).add(messages[i])
    assert sum(len(answers) > 1 for answers in last.values()) >= 3


@pytest.mark.parametrize("ending", ["n", "<", ">"])
def test_some_questions_end_as_fastchat_strips_them(conversations: list[list[str]], ending: str) -> None:
    questions = [m for messages in conversations for m in messages[::2]]
    assert any(question.endswith(ending) for question in questions)


def test_some_text_is_nasty(conversations: list[list[str]]) -> None:
    questions = [m for messages in conversations for m in messages[::2]]
    answers = [m for messages in conversations for m in messages[1::2]]
    assert any("<n>" in question for question in questions)
    assert any("<n>" in answer for answer in answers)
    assert any("\n" in answer for answer in answers)
    assert any("`kubectl" in answer for answer in answers)
    assert any(re.search(r"[\U0001F300-\U0001FAFF]", answer) for answer in answers)
    assert any(re.search(r"\d", answer) for answer in answers)
