"""The one renderer: what is trained and what is asked come from here.

A sequence is the prompt, `<sep>`, the answer, `<eod>`. The prompt is the system prompt and a line end, if
there is one, then the messages joined by the characters `<n>`; it is encoded in one piece, as the answer
is. FastChat's `yuan2` template writes the same text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from yuan2_core.contract import LossMode
from yuan2_core.errors import MessageError
from yuan2_core.messages import Message, MessageLike, Turn, read_dialogue
from yuan2_core.tokenizer import Yuan2Tokenizer

__all__ = [
    "Conversation",
    "IGNORED",
    "Message",
    "Rendered",
    "Turn",
    "render",
    "render_prompt",
    "sequence_count",
]

IGNORED: Final = -100
"""Label of a token that is not learned (PyTorch's `ignore_index`)."""

SEPARATOR: Final = "<n>"
"""Stands between messages. It is text, not a token, and never learned."""


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
    if loss not in ("efficient", "last_response", "split_example"):
        raise ValueError(f"loss: {loss!r} is not efficient, last_response or split_example")
    turns = conversation.turns
    ends = range(1, len(turns) + 1) if loss == "split_example" else (len(turns),)
    sequences = (_sequence(conversation.system, turns[:end], tokenizer, max_length, loss) for end in ends)
    return [sequence for sequence in sequences if sequence is not None]


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
    history = _History(dialogue.system, dialogue.turns, dialogue.question)
    prompt = _fit(history, tokenizer, max_length, with_labels=False)
    assert prompt is not None  # <sep> alone fits any max_length
    return prompt.input_ids


@dataclass(frozen=True)
class _History:
    """What a prompt is made of."""

    system: str | None
    turns: tuple[Turn, ...]
    question: str

    def shortened(self) -> list[_History]:
        """This and ever shorter ones: its oldest turns go one by one, the system prompt goes last."""
        cuts = [
            _History(self.system, self.turns[start:], self.question) for start in range(len(self.turns) + 1)
        ]
        return [*cuts, _History(None, (), self.question)] if self.system else cuts


def _sequence(
    system: str | None,
    turns: Sequence[Turn],
    tokenizer: Yuan2Tokenizer,
    max_length: int | None,
    loss: LossMode,
) -> Rendered | None:
    """The sequence that ends with the last turn's answer; None when no label fits."""
    answer = [*tokenizer.encode(turns[-1].answer, structure=False), tokenizer.eod_id]
    budget = None if max_length is None else max_length - len(answer)
    history = _History(system, tuple(turns[:-1]), turns[-1].question)
    prompt = _fit(history, tokenizer, budget, with_labels=loss == "efficient")
    if prompt is None:
        return None
    return Rendered(prompt.input_ids + answer, prompt.labels + answer)


def _fit(
    history: _History, tokenizer: Yuan2Tokenizer, budget: int | None, *, with_labels: bool
) -> Rendered | None:
    """The longest form of a prompt that fits, `<sep>` included; None when not even `<sep>` fits."""
    whole = _prompt(history, tokenizer, with_labels)
    if budget is None or len(whole.input_ids) <= budget:
        return whole
    if budget < 1:
        return None
    cuts = history.shortened()
    # Each cut is shorter than the one before it, so the first that fits can be searched by halves.
    found = bisect_left(cuts, True, key=lambda cut: len(_prompt(cut, tokenizer, False).input_ids) <= budget)
    if found < len(cuts):
        return _prompt(cuts[found], tokenizer, with_labels)
    last = _prompt(cuts[-1], tokenizer, with_labels)
    return Rendered(last.input_ids[-budget:], last.labels[-budget:])


def _prompt(history: _History, tokenizer: Yuan2Tokenizer, with_labels: bool) -> Rendered:
    """Ids of a prompt and, if asked for, labels on the tokens of the answers in it."""
    parts = [part for turn in history.turns for part in turn] + [history.question]
    head = f"{history.system}\n" if history.system else ""
    text = head + SEPARATOR.join(parts)
    if not with_labels or not history.turns:
        ids = [*tokenizer.encode(text, structure=False), tokenizer.sep_id]
        return Rendered(ids, [IGNORED] * len(ids))
    ids, starts = tokenizer.encode_spans(text, structure=False)
    labels = [IGNORED] * len(ids)
    for begin, end in _answer_spans(len(head.encode()), history.turns):
        first, last = bisect_left(starts, begin), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return Rendered([*ids, tokenizer.sep_id], [*labels, IGNORED])


def _answer_spans(offset: int, turns: Sequence[Turn]) -> Iterator[tuple[int, int]]:
    """First byte and byte after the last of each answer, for turns that begin at a byte of the prompt."""
    gap = len(SEPARATOR.encode())
    for turn in turns:
        begin = offset + len(turn.question.encode()) + gap
        end = begin + len(turn.answer.encode())
        yield begin, end
        offset = end + gap
