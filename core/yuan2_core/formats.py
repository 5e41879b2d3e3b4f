"""Training data: FastChat, Alpaca and BELLE files to conversations.

Every record is checked; what is wrong with it names the file, the record and the field. A record that
cannot be used does not end the reading, so that one message tells about all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from yuan2_core.conversation import Conversation
from yuan2_core.errors import DatasetError, MessageError
from yuan2_core.json_records import BrokenRecord, read_records
from yuan2_core.messages import FASTCHAT, Message, Turn, check_answer, check_text, kind, read_dialogue
from yuan2_core.sections import DatasetFormat

__all__ = [
    "Dataset",
    "DatasetFormat",
    "NumberedRecord",
    "RecordError",
    "check_errors",
    "convert",
    "iterate_dataset",
    "load_conversations",
    "number_records",
    "read_dataset",
]

ERRORS_SHOWN: Final = 10
"""Record errors that a message spells out."""

_ID_SHOWN: Final = 40
"""Characters of a record's `id` in a message."""

ALPACA_PROMPT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""Prompt of an Alpaca record without input (Stanford Alpaca)."""

ALPACA_PROMPT_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Prompt of an Alpaca record with input (Stanford Alpaca)."""

_SPEAKER: Final = re.compile(r"(?:\A|\n)(Human|Assistant):")
"""Begins a message in BELLE's `instruction`."""

_Reader = Callable[[Mapping[str, Any]], tuple[tuple[Turn, ...], str | None]]


@dataclass(frozen=True)
class RecordError:
    """A record that cannot be used.

    Attributes:
        source: the file.
        record: its number, from 1.
        record_id: its `id`, if it has one.
        problem: the field and what is wrong with it.
    """

    source: str
    record: int
    record_id: str | None
    problem: str

    def __str__(self) -> str:
        name = f" (id {self.record_id})" if self.record_id is not None else ""
        return f"{self.source}, record {self.record}{name}, {self.problem}"


@dataclass(frozen=True)
class Dataset:
    """What a file holds.

    Attributes:
        conversations: usable records, in file order.
        errors: the others.
        total: records of both kinds.
    """

    conversations: list[Conversation]
    errors: list[RecordError]
    total: int


def load_conversations(path: str | Path, format: DatasetFormat = "auto") -> list[Conversation]:  # noqa: A002
    """All conversations of a file, in file order.

    Args:
        path: a JSON array, an array of arrays, or JSON Lines, in UTF-8.
        format: layout of a record; `auto` decides by the first one.

    Raises:
        DatasetError: the file cannot be used, or any record in it; the message has the first ten errors.
    """
    return read_dataset(path, format).conversations


def read_dataset(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
    max_invalid_fraction: float = 0.0,
) -> Dataset:
    """All conversations of a file and the errors of the records that could not be used.

    Args:
        path: as in `load_conversations`.
        format: as in `load_conversations`.
        max_invalid_fraction: share of the records that may be unusable, 0 to 1.

    Raises:
        DatasetError: the file cannot be used, too many records are wrong, or no record is right.
    """
    conversations: list[Conversation] = []
    errors: list[RecordError] = []
    for item in iterate_dataset(path, format):
        if isinstance(item, RecordError):
            errors.append(item)
        else:
            conversations.append(item)
    dataset = Dataset(conversations, errors, len(conversations) + len(errors))
    shown = [str(error) for error in errors[:ERRORS_SHOWN]]
    check_errors(path, dataset.total, len(errors), shown, max_invalid_fraction)
    return dataset


def iterate_dataset(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
) -> Iterator[Conversation | RecordError]:
    """Conversations and errors, one for each record, in file order and without holding the file in memory.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or has a layout that is none of the known ones.
    """
    for record in number_records(path, format):
        yield convert(record, str(Path(path)))


class NumberedRecord(NamedTuple):
    """A record as it stands in a file.

    Attributes:
        number: its number, from 1.
        content: what JSON makes of it, or a `BrokenRecord`.
        layout: `fastchat`, `alpaca` or `belle`; None where the record is no object.
    """

    number: int
    content: Any
    layout: str | None


def number_records(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
) -> Iterator[NumberedRecord]:
    """Records of a file in order, not checked yet: `convert` may do that in another process.

    Raises:
        DatasetError: as `iterate_dataset`.
    """
    if format not in ("auto", *_READERS):
        raise ValueError(f"format: {format!r} is not auto, fastchat, alpaca or belle")
    file = Path(path)
    layout = None if format == "auto" else str(format)
    for number, record in enumerate(read_records(file), start=1):
        if isinstance(record, dict):
            layout = layout or _detect(record, file, number)
            yield NumberedRecord(number, record, layout)
        else:
            yield NumberedRecord(number, record, None)


def convert(record: NumberedRecord, source: str) -> Conversation | RecordError:
    """The conversation of a record of the file `source`, or what is wrong with it."""
    number, content, layout = record
    if layout is not None:
        return _convert(content, _READERS[layout], source, number)
    broken = isinstance(content, BrokenRecord)
    problem = content.problem if broken else f"must be an object, not {kind(content)}"
    return RecordError(source, number, None, problem)


def _convert(
    record: Mapping[str, Any], reader: _Reader, source: str, number: int
) -> Conversation | RecordError:
    try:
        turns, system = reader(record)
        return Conversation.of_turns(turns, system, source=source, record=number)
    except MessageError as error:
        name = record.get("id")
        return RecordError(source, number, None if name is None else str(name)[:_ID_SHOWN], str(error))


def _fastchat(record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
    messages = _field(record, "conversations")
    if not isinstance(messages, list):
        raise MessageError("conversations", f"must be a list of messages, not {kind(messages)}")
    dialogue = read_dialogue(messages, record.get("system"), field="conversations", style=FASTCHAT)
    if not dialogue.turns:
        raise MessageError("conversations", "no human message with an answer")
    return dialogue.turns, dialogue.system


def _alpaca(record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
    instruction = check_text(_field(record, "instruction"), "instruction")
    context = check_text(record.get("input", ""), "input")
    for name in ("history", "system"):
        if record.get(name):
            raise MessageError(
                name, "not part of the Alpaca layout; write such data as FastChat's conversations"
            )
    answer = check_answer(check_text(_field(record, "output"), "output"), "output")
    prompt = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return (Turn(prompt.format(instruction=instruction, input=context), answer),), None


def _belle(record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
    instruction = check_text(_field(record, "instruction"), "instruction")
    if check_text(record.get("input", ""), "input"):
        raise MessageError(
            "input", "must be empty; in this layout the instruction holds the whole conversation"
        )
    answer = check_answer(check_text(_field(record, "output"), "output"), "output")
    messages = [*_belle_messages(instruction), Message("assistant", answer)]
    dialogue = read_dialogue(messages, field="instruction")
    if not dialogue.turns:
        raise MessageError("instruction", "no Human: message before the answer")
    return dialogue.turns, None


def _belle_messages(instruction: str) -> list[Message]:
    """Messages before the answer; the text ends with the `Assistant:` that the answer follows."""
    before, *parts = _SPEAKER.split(instruction)
    if before or not parts:
        raise MessageError("instruction", "must begin with Human:")
    speakers, texts = parts[::2], parts[1::2]
    if speakers[-1] != "Assistant" or texts[-1].strip():
        raise MessageError("instruction", "must end with Assistant:, which the output goes on from")
    said = zip(speakers[:-1], texts[:-1], strict=True)
    return [Message("user" if speaker == "Human" else "assistant", text) for speaker, text in said]


def _field(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise MessageError(name, "missing")
    return record[name]


_READERS: Final[Mapping[str, _Reader]] = {"fastchat": _fastchat, "alpaca": _alpaca, "belle": _belle}


def _detect(record: Mapping[str, Any], file: Path, number: int) -> str:
    """The layout of a record."""
    if "conversations" in record:
        return "fastchat"
    instruction = record.get("instruction")
    if "instruction" in record:
        return "belle" if isinstance(instruction, str) and _SPEAKER.match(instruction) else "alpaca"
    fields = ", ".join(sorted(record)[:10]) or "none"
    raise DatasetError(
        f"{file}, record {number}: the layout cannot be told from its fields ({fields}); "
        "FastChat has conversations, Alpaca and BELLE have instruction and output"
    )


def check_errors(
    path: str | Path, total: int, wrong: int, shown: Sequence[str], max_invalid_fraction: float
) -> None:
    """Refuse a file with too many records that cannot be used.

    Args:
        path: the file.
        total: its records.
        wrong: those that cannot be used.
        shown: what is wrong with the first `ERRORS_SHOWN` of them.
        max_invalid_fraction: share of the records that may be unusable, 0 to 1.

    Raises:
        DatasetError: too many records are wrong, or no record is right.
    """
    if total == 0:
        raise DatasetError(f"{path}: no records; it must hold conversations as a JSON array or JSON Lines")
    if wrong and (wrong > max_invalid_fraction * total or wrong == total):
        listed = "; ".join(shown) + (f"; and {wrong - len(shown)} more" if wrong > len(shown) else "")
        raise DatasetError(f"{wrong} of {total} records cannot be used: {listed}")
