"""Messages of a conversation: reading them, and the rules about who speaks when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from yuan2_core.errors import MessageError

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """What one side said."""

    role: Role
    content: str


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Style(NamedTuple):
    """How a message is written as an object: the names of its two fields and of the roles."""

    role: str
    content: str
    roles: Mapping[str, Role]


OPENAI: Final = Style("role", "content", {"system": "system", "user": "user", "assistant": "assistant"})
FASTCHAT: Final = Style("from", "value", {"system": "system", "human": "user", "gpt": "assistant"})

MessageLike = Message | Mapping[str, object]
"""A `Message`, or an object in OpenAI's style (`role`, `content`) or in FastChat's (`from`, `value`)."""


@dataclass(frozen=True)
class Dialogue:
    """Messages that keep the rules.

    Attributes:
        system: text in front of everything; None when there is none.
        turns: questions with their answers, oldest first.
        question: a last question that has no answer yet.
    """

    system: str | None
    turns: tuple[Turn, ...]
    question: str | None


def read_dialogue(
    messages: Sequence[MessageLike],
    system: object = None,
    *,
    field: str = "messages",
    style: Style | None = None,
) -> Dialogue:
    """Check messages and pair questions with answers.

    A message of the assistant before the first question is left out: nothing was asked. A system message
    may come first, unless `system` is given; an empty one counts as none.

    Args:
        messages: who said what, in order.
        system: the system prompt, where it is kept apart from the messages; None for none.
        field: name of the list, for errors.
        style: how every message is written; None accepts both styles.

    Raises:
        MessageError: an unknown role, two messages of one role in a row, an empty answer, or a value that
            is no text.
    """
    spoken = [read_message(message, f"{field}[{i}]", style) for i, message in enumerate(messages)]
    prompt = None if system is None else check_text(system, "system")
    skip = 0
    if spoken and spoken[0].role == "system":
        if prompt is not None:
            raise MessageError(
                f"{field}[0]", "a system message beside the system prompt of the record; keep one"
            )
        prompt = spoken[0].content
        skip = 1
    turns, question = _pair(spoken[skip:], field, skip)
    return Dialogue(prompt or None, turns, question)


def read_message(message: MessageLike, field: str, style: Style | None = None) -> Message:
    """One message in either style, or in the given one.

    Raises:
        MessageError: it is not an object, lacks a field, has an unknown role or a value that is not text.
    """
    if isinstance(message, Message):
        style, message = OPENAI, message._asdict()
    if not isinstance(message, Mapping):
        raise MessageError(field, f"must be an object, not {kind(message)}")
    style = style or (FASTCHAT if FASTCHAT.role in message or FASTCHAT.content in message else OPENAI)
    name = message.get(style.role)
    role = style.roles.get(name) if isinstance(name, str) else None
    if role is None:
        problem = "missing" if style.role not in message else f"unknown role {brief(name)}"
        raise MessageError(f"{field}.{style.role}", f"{problem}; known are {', '.join(style.roles)}")
    if style.content not in message:
        raise MessageError(f"{field}.{style.content}", "missing")
    content = check_text(message[style.content], f"{field}.{style.content}")
    if role == "assistant":
        check_answer(content, f"{field}.{style.content}")
    return Message(role, content)


def check_text(value: object, field: str) -> str:
    """The value, if it is text that UTF-8 can write.

    Raises:
        MessageError: it is not.
    """
    if not isinstance(value, str):
        raise MessageError(field, f"must be text, not {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise MessageError(field, f"character {error.start} is {half}, half a surrogate pair") from None
    return value


def check_answer(answer: str, field: str) -> str:
    """The answer, if there is something in it to learn.

    Raises:
        MessageError: it is empty or white space.
    """
    if not answer or answer.isspace():
        raise MessageError(field, "empty answer")
    return answer


def brief(value: object, limit: int = 40) -> str:
    """A value as a message shows it, at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def kind(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _pair(spoken: Iterable[Message], field: str, first: int) -> tuple[tuple[Turn, ...], str | None]:
    """Turns, and the question at the end that nobody answered."""
    turns: list[Turn] = []
    question: str | None = None
    before: Role | None = None
    for position, (role, content) in enumerate(spoken, start=first):
        if role == "system":
            raise MessageError(f"{field}[{position}]", "a system message can only come first")
        if role == before:
            raise MessageError(f"{field}[{position}]", f"two {role} messages in a row; they must alternate")
        if role == "user":
            question = content
        elif question is not None:
            turns.append(Turn(question, content))
            question = None
        before = role
    return tuple(turns), question
