"""Who may say what, and how a broken rule is told."""

from __future__ import annotations

from typing import Any

import pytest

from yuan2_core.errors import MessageError, UserError
from yuan2_core.messages import FASTCHAT, Turn, read_dialogue


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


BROKEN: list[tuple[list[Any], str]] = [
    ([user("a"), user("b")], "messages[1]: two user messages in a row"),
    ([user("a"), assistant("b"), assistant("c")], "messages[2]: two assistant messages in a row"),
    ([assistant("a"), assistant("b"), user("c")], "messages[1]: two assistant messages in a row"),
    ([user("a"), assistant("b"), system("c")], "messages[2]: a system message can only come first"),
    ([{"role": "robot", "content": "a"}], "messages[0].role: unknown role 'robot'; known are system, user"),
    ([{"role": ["user"], "content": "a"}], "messages[0].role: unknown role ['user']"),
    ([{"content": "a"}], "messages[0].role: missing"),
    ([{"role": "user"}], "messages[0].content: missing"),
    ([user(None)], "messages[0].content: must be text, not null"),
    ([user(3)], "messages[0].content: must be text, not a number"),
    ([user(True)], "messages[0].content: must be text, not a boolean"),
    ([user(["a"])], "messages[0].content: must be text, not a list"),
    ([user({"a": 1})], "messages[0].content: must be text, not an object"),
    ([user("a"), assistant("")], "messages[1].content: empty answer"),
    ([user("a"), assistant(" \n")], "messages[1].content: empty answer"),
    ([user("ab\ud83d")], "messages[0].content: character 2 is U+D83D, half a surrogate pair"),
    (["hello"], "messages[0]: must be an object, not text"),
    ([{"from": "user", "value": "a"}], "messages[0].from: unknown role 'user'; known are system, human, gpt"),
]


@pytest.mark.parametrize(("messages", "problem"), BROKEN, ids=[problem for _, problem in BROKEN])
def test_a_broken_rule_names_the_field(messages: list[Any], problem: str) -> None:
    with pytest.raises(MessageError) as caught:
        read_dialogue(messages)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_turns_and_the_open_question_are_paired() -> None:
    dialogue = read_dialogue([system("s"), user("a"), assistant("b"), user("c")])
    assert (dialogue.system, dialogue.turns, dialogue.question) == ("s", (Turn("a", "b"),), "c")


def test_an_answer_to_nothing_is_left_out() -> None:
    assert read_dialogue([system("s"), assistant("x"), user("a")]).turns == ()
    assert read_dialogue([assistant("x"), user("a"), assistant("b")]).turns == (Turn("a", "b"),)


def test_an_empty_question_is_a_question() -> None:
    assert read_dialogue([user(""), assistant("b")]).turns == (Turn("", "b"),)


def test_two_system_prompts_are_refused() -> None:
    with pytest.raises(MessageError, match="beside the system prompt"):
        read_dialogue([system("s"), user("a")], "t")


def test_a_system_prompt_must_be_text() -> None:
    with pytest.raises(MessageError, match="system: must be text, not a number"):
        read_dialogue([user("a")], 7)


def test_a_given_style_is_the_only_one() -> None:
    with pytest.raises(MessageError, match=r"conversations\[0\].from: missing"):
        read_dialogue([user("a")], field="conversations", style=FASTCHAT)


def test_an_error_of_a_user_is_one_short_line() -> None:
    assert str(UserError("a\nb\u2028c")) == "a b c"
    with pytest.raises(MessageError) as caught:
        read_dialogue([{"role": "x" * 5000, "content": "a"}])
    assert len(str(caught.value)) < 150
