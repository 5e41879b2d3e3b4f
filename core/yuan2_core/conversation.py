"""The one renderer: what is trained and what is asked come from here.

A sequence is the prompt, `<sep>`, the answer, `<eod>`. The prompt is the system prompt and a line end, if
there is one, then the messages joined by the characters `<n>`; it is encoded in one piece, as the answer
is. FastChat's `yuan2` template writes the same text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from yuan2_core.errors import MessageError
from yuan2_core.messages import Message, MessageLike, Turn, read_dialogue
from yuan2_core.sections import LossMode
from yuan2_core.segments import BYTES_OF_ID, Ids, id_bytes
from yuan2_core.tokenizer import Yuan2Tokenizer

__all__ = [
    "Conversation",
    "IGNORED",
    "Message",
    "Rendered",
    "Turn",
    "Spans",
    "render",
    "render_prompt",
    "render_spans",
    "sequence_count",
]

IGNORED: Final = -100
"""Label of a token that is not learned (PyTorch's `ignore_index`)."""

SEPARATOR: Final = "<n>"
"""Stands between messages. It is text, not a token, and never learned."""

_SHARED_FROM: Final = 512
"""Characters of a conversation from which its prompts are encoded together: below, one by one is faster."""


@dataclass(frozen=True, init=False)
class Conversation:
    """Questions with their answers.

    Attributes:
        turns: questions and answers, oldest first, at least one.
        system: text in front of everything.
        source: the file it came from.
        record: its number in that file, from 1.
    """

    turns: tuple[Turn, ...]
    system: str | None
    source: str | None
    record: int | None

    def __init__(
        self,
        messages: Sequence[MessageLike],
        system: str | None = None,
        *,
        source: str | None = None,
        record: int | None = None,
    ) -> None:
        """Pair messages, in OpenAI's or FastChat's style, into turns.

        A first message of the assistant and a last one of the user are left out.

        Raises:
            MessageError: an unknown role, two messages of one role in a row, an empty answer, or no answer
                at all.
        """
        dialogue = read_dialogue(messages, system)
        if not dialogue.turns:
            raise MessageError("messages", "no question with an answer")
        self._set(dialogue.turns, dialogue.system, source, record)

    @classmethod
    def of_turns(
        cls,
        turns: Sequence[Turn],
        system: str | None = None,
        *,
        source: str | None = None,
        record: int | None = None,
    ) -> Conversation:
        """A conversation of turns that were checked already."""
        conversation = cls.__new__(cls)
        conversation._set(tuple(turns), system, source, record)
        return conversation

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns as single messages, the system prompt first if there is one."""
        system = [Message("system", self.system)] if self.system else []
        pairs = ((Message("user", turn.question), Message("assistant", turn.answer)) for turn in self.turns)
        return (*system, *(message for pair in pairs for message in pair))

    def _set(
        self, turns: tuple[Turn, ...], system: str | None, source: str | None, record: int | None
    ) -> None:
        for name, value in (("turns", turns), ("system", system), ("source", source), ("record", record)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Rendered:
    """One training sequence.

    Attributes:
        input_ids: token ids of prompt, `<sep>`, answer and `<eod>`.
        labels: for each token its id where it is learned, else `IGNORED`; not shifted.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Spans:
    """One training sequence as arrays: a label is its token where a span covers it.

    Attributes:
        ids: [T] int32, as `Rendered.input_ids`.
        learned: [S, 2] int32, first token and token after the last of each stretch that is learned.
    """

    ids: Ids
    learned: NDArray[np.int32]


def render(
    conversation: Conversation,
    tokenizer: Yuan2Tokenizer,
    loss: LossMode = "split_example",
    max_length: int | None = None,
) -> list[Rendered]:
    """Turn a conversation into training sequences.

    `efficient` gives one sequence with every answer learned, `last_response` the same one with its last
    answer learned, `split_example` a sequence for each answer, with the turns before it as its prompt.

    Args:
        conversation: what was said.
        tokenizer: a Yuan 2.0 tokenizer.
        loss: which answers are learned.
        max_length: most tokens of a sequence; None for no limit. A longer one loses its oldest turns, then
            the system prompt, then the beginning of its question.

    Returns:
        At most `sequence_count(conversation, loss)` sequences: one that its answer alone overfills is left
        out.
    """
    return [_as_lists(sequence) for sequence in render_spans(conversation, tokenizer, loss, max_length)]


def render_spans(
    conversation: Conversation,
    tokenizer: Yuan2Tokenizer,
    loss: LossMode = "split_example",
    max_length: int | None = None,
) -> list[Spans]:
    """What `render` gives, as arrays: for many conversations."""
    if loss not in ("efficient", "last_response", "split_example"):
        raise ValueError(f"loss: {loss!r} is not efficient, last_response or split_example")
    turns = conversation.turns
    ends = range(1, len(turns) + 1) if loss == "split_example" else (len(turns),)
    script = _Script(conversation.system, turns, tokenizer, shared=len(ends) > 1)
    sequences = (_sequence(script, end, max_length, loss) for end in ends)
    return [sequence for sequence in sequences if sequence is not None]


def _as_lists(sequence: Spans) -> Rendered:
    ids = sequence.ids.tolist()
    labels = [IGNORED] * len(ids)
    for first, last in sequence.learned.tolist():
        labels[first:last] = ids[first:last]
    return Rendered(ids, labels)


def sequence_count(conversation: Conversation, loss: LossMode) -> int:
    """Sequences that `render` makes of a conversation when none is too long."""
    return len(conversation.turns) if loss == "split_example" else 1


def render_prompt(
    messages: Sequence[MessageLike], tokenizer: Yuan2Tokenizer, max_length: int | None = None
) -> list[int]:
    """Token ids to ask a model with: equal, token for token, to what stands before the answer in training.

    Args:
        messages: a conversation whose last message is the user's, in OpenAI's or FastChat's style.
        tokenizer: a Yuan 2.0 tokenizer.
        max_length: most tokens; a longer prompt is cut as in `render`.

    Returns:
        The prompt's ids, `<sep>` last.

    Raises:
        MessageError: the messages do not alternate, an answer is empty, or the last message is not the
            user's.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: {max_length} leaves no room for a prompt; give at least 1")
    dialogue = read_dialogue(messages)
    if dialogue.question is None:
        raise MessageError("messages", "the last message must be the user's")
    script = _Script(dialogue.system, (*dialogue.turns, Turn(dialogue.question, "")), tokenizer, shared=False)
    prompt = _fit(script, len(script.turns), max_length)
    assert prompt is not None  # <sep> alone fits any max_length
    ids: list[int] = np.frombuffer(prompt.ids, dtype=np.int32).tolist()
    return ids


class _Script:
    """The text of a conversation, and the ids of any stretch of it as if that were all there is.

    With `shared` it is encoded once: the prompts of `split_example` are beginnings of one another, and their
    answers lie in the prompts that follow.
    """

    def __init__(
        self, system: str | None, turns: Sequence[Turn], tokenizer: Yuan2Tokenizer, *, shared: bool
    ) -> None:
        self.turns = turns
        self.tokenizer = tokenizer
        self.head = f"{system}\n" if system else ""
        self.text = self.head + SEPARATOR.join(part for turn in turns for part in turn)
        self.parts = _part_borders(len(self.head), turns)
        self._encoded = tokenizer.read(self.text) if shared and len(self.text) > _SHARED_FROM else None
        self._sep, self._eod = id_bytes(tokenizer.sep_id), id_bytes(tokenizer.eod_id)

    def answer(self, end: int) -> bytes:
        """The answer of turn `end`, and `<eod>`."""
        return self._ids(*self.parts[2 * end - 1]) + self._eod

    def prompt(self, start: int, end: int) -> bytes:
        """Turns from `start` (0-based) up to the question of turn `end`, and `<sep>`.

        The system prompt stands before them, unless `start` is `end`, which leaves the question alone.
        """
        first, last = self.parts[2 * min(start, end - 1)][0], self.parts[2 * end - 2][1]
        if self.head and 0 < start < end:
            ids = self.tokenizer.encode_bytes(self.head + self.text[first:last], structure=False)
        else:
            ids = self._ids(first if start else 0, last)
        return ids + self._sep

    def answers_in_prompt(self, start: int, end: int) -> NDArray[np.int32]:
        """Spans of the answers in `prompt(start, end)`, one at least; a token counts by its first byte."""
        begin, last = self.parts[2 * start][0], self.parts[2 * end - 2][1]
        _, starts = self.tokenizer.encode_spans(self.head + self.text[begin:last], structure=False)
        borders: list[int] = []
        offset = len(self.head.encode())
        for turn in range(start, end - 1):
            question, answer = (len(part.encode()) for part in self.turns[turn])
            first = offset + question + len(SEPARATOR)
            borders += (first, first + answer)
            offset = first + answer + len(SEPARATOR)
        return np.searchsorted(starts, borders).astype(np.int32).reshape(-1, 2)

    def _ids(self, first: int, last: int) -> bytes:
        if self._encoded is None:
            return self.tokenizer.encode_bytes(self.text[first:last], structure=False)
        return self._encoded.part(first, last)


@dataclass(frozen=True)
class _Prompt:
    """A prompt that fits: its ids (int32 bytes), and the turn it begins with."""

    ids: bytes
    start: int


def _sequence(script: _Script, end: int, max_length: int | None, loss: LossMode) -> Spans | None:
    """The sequence that ends with the answer of turn `end`; None when no label fits."""
    answer = script.answer(end)
    prompt = _fit(script, end, None if max_length is None else max_length - len(answer) // BYTES_OF_ID)
    if prompt is None:
        return None
    ids = np.frombuffer(prompt.ids + answer, dtype=np.int32)
    learned = np.array([[len(prompt.ids) // BYTES_OF_ID, len(ids)]], dtype=np.int32)
    if loss == "efficient" and prompt.start < end - 1:
        earlier = script.answers_in_prompt(prompt.start, end)
        learned = np.concatenate((earlier[earlier[:, 0] < earlier[:, 1]], learned))
    return Spans(ids, learned)


def _fit(script: _Script, end: int, budget: int | None) -> _Prompt | None:
    """The longest form of a prompt that fits, `<sep>` included; None when not even `<sep>` fits.

    Its oldest turns go one by one, then the system prompt, then the beginning of the question.
    """
    whole = script.prompt(0, end)
    if budget is None or len(whole) <= BYTES_OF_ID * budget:
        return _Prompt(whole, 0)
    if budget < 1:
        return None
    cuts = range(end + 1 if script.head else end)
    # Each cut is shorter than the one before it, so the first that fits can be searched by halves.
    found = bisect_left(cuts, True, key=lambda start: len(script.prompt(start, end)) <= BYTES_OF_ID * budget)
    if found < len(cuts):
        return _Prompt(script.prompt(found, end), found)
    last = script.prompt(cuts[-1], end)
    return _Prompt(last[-BYTES_OF_ID * budget :], cuts[-1])


def _part_borders(offset: int, turns: Sequence[Turn]) -> list[tuple[int, int]]:
    """First character and character after the last of each question and answer, in turns."""
    borders = []
    for turn in turns:
        for part in turn:
            borders.append((offset, offset + len(part)))
            offset += len(part) + len(SEPARATOR)
    return borders
