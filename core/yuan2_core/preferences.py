"""Preference data in LLaMA-Factory's and TRL's layouts. Pure.

A record has two answers of which one is preferred, or a single one that is marked as desirable or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from yuan2_core.conversation import Conversation
from yuan2_core.errors import MessageError
from yuan2_core.layouts import (
    OPENAI_RECORD,
    SHAREGPT,
    alpaca_prompt,
    answer_of,
    field_of,
    list_of,
    openai_messages,
    trl_prompt,
    with_tools,
)
from yuan2_core.messages import Dialogue, Turn, kind, read_dialogue

CHOSEN: Final = 1
REJECTED: Final = -1

MARKS: Final = ("label", "kto_tag")
"""TRL's and LLaMA-Factory's fields for whether an answer is desirable."""


@dataclass(frozen=True)
class Preference:
    """A question and judged answers to it.

    Attributes:
        system: text in front of everything.
        turns: what was said before the question.
        question: what is answered.
        answers: the preferred answer and the other one, or a single one.
        marks: `CHOSEN` or `REJECTED` for each.
    """

    system: str | None
    turns: tuple[Turn, ...]
    question: str
    answers: tuple[str, ...]
    marks: tuple[int, ...]

    def with_answer(self, answer: str) -> Conversation:
        """The conversation that ends with an answer."""
        return Conversation.of_turns((*self.turns, Turn(self.question, answer)), self.system)


def read_preference(record: Mapping[str, Any], layout: str) -> Preference:
    """The question and the judged answers of a record.

    Args:
        record: with `chosen` and `rejected`, or with one answer and `label` or `kto_tag`.
        layout: of its prompt: `fastchat`, `openai`, `alpaca` or `trl`.

    Raises:
        MessageError: a field is missing or wrong.
    """
    if layout not in _PROMPTS:
        raise MessageError("format", f"{layout} has no answers to compare; known are {', '.join(_PROMPTS)}")
    if "chosen" in record or "rejected" in record:
        return _pair(record, layout)
    name = next((name for name in MARKS if name in record), None)
    if name is None:
        raise MessageError("chosen", "missing; or label (kto_tag), for a single answer")
    if not isinstance(record[name], bool):
        raise MessageError(name, f"must be true or false, not {kind(record[name])}")
    prompt, answer = _answered(record, layout)
    return _preference(prompt, (answer,), (CHOSEN if record[name] else REJECTED,))


def _pair(record: Mapping[str, Any], layout: str) -> Preference:
    if layout == "trl" and "prompt" not in record:
        return _implicit(record)
    prompt = _PROMPTS[layout](record)
    answers = (answer_of(field_of(record, name), name) for name in ("chosen", "rejected"))
    return _preference(prompt, tuple(answers), (CHOSEN, REJECTED))


def _implicit(record: Mapping[str, Any]) -> Preference:
    """TRL's pairs without a prompt: two conversations that differ in their last answer."""
    chosen, rejected = (
        read_dialogue(openai_messages(record, name), field=name, style=OPENAI_RECORD)
        for name in ("chosen", "rejected")
    )
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if not dialogue.turns or dialogue.question is not None:
            raise MessageError(name, "must end with an answer")
    before = (chosen.system, chosen.turns[:-1], chosen.turns[-1].question)
    if before != (rejected.system, rejected.turns[:-1], rejected.turns[-1].question):
        raise MessageError("rejected", "must be the conversation of chosen, but for its last answer")
    prompt = Dialogue(*before)
    return _preference(prompt, (chosen.turns[-1].answer, rejected.turns[-1].answer), (CHOSEN, REJECTED))


def _answered(record: Mapping[str, Any], layout: str) -> tuple[Dialogue, str]:
    """A prompt and the one answer to it."""
    if layout in ("alpaca", "trl"):
        name = "output" if layout == "alpaca" else "completion"
        return _PROMPTS[layout](record), answer_of(field_of(record, name), name)
    dialogue = _dialogue(record, layout)
    name = _LIST_OF[layout]
    if not dialogue.turns or dialogue.question is not None:
        raise MessageError(name, "must end with an answer")
    *before, last = dialogue.turns
    return Dialogue(dialogue.system, tuple(before), last.question), last.answer


def _preference(prompt: Dialogue, answers: tuple[str, ...], marks: tuple[int, ...]) -> Preference:
    return Preference(prompt.system, prompt.turns, prompt.question or "", answers, marks)


def _dialogue(record: Mapping[str, Any], layout: str) -> Dialogue:
    name = _LIST_OF[layout]
    if layout == "openai":
        dialogue = read_dialogue(openai_messages(record, name), field=name, style=OPENAI_RECORD)
    else:
        dialogue = read_dialogue(list_of(record, name), record.get("system"), field=name, style=SHAREGPT)
    return with_tools(dialogue, record)


def _asked(record: Mapping[str, Any], layout: str) -> Dialogue:
    """A conversation whose last message asks."""
    dialogue = _dialogue(record, layout)
    if dialogue.question is None:
        raise MessageError(_LIST_OF[layout], "its last message must ask something")
    return dialogue


_LIST_OF: Final = {"fastchat": "conversations", "openai": "messages"}
_PROMPTS: Final[Mapping[str, Callable[[Mapping[str, Any]], Dialogue]]] = {
    "fastchat": lambda record: _asked(record, "fastchat"),
    "openai": lambda record: _asked(record, "openai"),
    "alpaca": alpaca_prompt,
    "trl": lambda record: trl_prompt(field_of(record, "prompt")),
}
