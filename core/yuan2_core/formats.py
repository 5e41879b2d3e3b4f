"""Training data: files and directories of every layout to conversations and raw text.

Every record is checked; what is wrong with it names the file, the record, the field and the line. A record
that cannot be used does not end the reading, so that one message tells about all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from yuan2_core.conversation import Conversation
from yuan2_core.errors import DatasetError, MessageError
from yuan2_core.json_records import BrokenRecord, read_records, reading
from yuan2_core.layouts import READERS, detect, read_text
from yuan2_core.messages import kind
from yuan2_core.preferences import Preference, read_preference
from yuan2_core.raw_text import Document
from yuan2_core.sections import DataFile, DatasetFormat

__all__ = [
    "DataPart",
    "Dataset",
    "DatasetFormat",
    "NumberedRecord",
    "RecordError",
    "check_errors",
    "convert",
    "iterate_dataset",
    "load_conversations",
    "number_records",
    "parts_of",
    "read_dataset",
]

ERRORS_SHOWN: Final = 10
"""Record errors that a message spells out."""

ENDINGS: Final = (".json", ".jsonl", ".txt")
"""Names of the files in a directory that are data; `.gz` may follow."""

TEXT_PIECE: Final = 1 << 20
"""Characters of a plain text after which its next line begins another record."""

_ID_SHOWN: Final = 40
"""Characters of a record's `id` in a message."""

Item = Conversation | Document | Preference
"""What a record holds."""


@dataclass(frozen=True)
class DataPart:
    """A file to read.

    Attributes:
        path: of the file.
        format: layout of its records.
        weight: how often each record is taken; of 0.5, every second one is.
    """

    path: Path
    format: DatasetFormat = "auto"
    weight: float = 1.0


def parts_of(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
    files: Sequence[DataFile] = (),
) -> list[DataPart]:
    """The files of a data set, in order.

    Args:
        path: a file; or a directory, of which every file is read whose name ends as data does (`ENDINGS`).
        format: layout of the records.
        files: instead, what is read below that directory, each with a format and a weight.

    Raises:
        DatasetError: a directory cannot be read or holds no data.
    """
    root = Path(path)
    if not files:
        return [DataPart(file, format) for file in _files(root)]
    return [DataPart(file, item.format, item.weight) for item in files for file in _files(root / item.path)]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = (item for item in sorted(path.rglob("*")) if item.is_file() and not _hidden(item, path))
    found = [item for item in below if item.name.removesuffix(".gz").endswith(ENDINGS)]
    if not found:
        names = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise DatasetError(f"{path}: a directory without data: no file is called {names}, or so and .gz")
    return found


def _hidden(file: Path, root: Path) -> bool:
    """Whether a file or a directory above it is hidden: a mounted ConfigMap holds its files twice so."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


@dataclass(frozen=True)
class RecordError:
    """A record that cannot be used.

    Attributes:
        source: the file.
        record: its number, from 1.
        record_id: its `id`, if it has one.
        problem: the field and what is wrong with it.
        line: where it begins, from 1; None where the problem tells.
    """

    source: str
    record: int
    record_id: str | None
    problem: str
    line: int | None = None

    def __str__(self) -> str:
        name = f" (id {self.record_id})" if self.record_id is not None else ""
        line = f" (line {self.line})" if self.line is not None else ""
        return f"{self.source}, record {self.record}{name}, {self.problem}{line}"


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
    """All conversations of a file or directory, in order.

    Args:
        path: a JSON array, an array of arrays, or JSON Lines, in UTF-8, gzip or not; or a directory of such.
        format: layout of a record; `auto` decides by the first one of each file.

    Raises:
        DatasetError: a file cannot be used, or any record in it; the message has the first ten errors.
    """
    return read_dataset(path, format).conversations


def read_dataset(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
    max_invalid_fraction: float = 0.0,
) -> Dataset:
    """All conversations and the errors of the records that could not be used.

    Args:
        path: as in `load_conversations`.
        format: as in `load_conversations`.
        max_invalid_fraction: share of the records that may be unusable, 0 to 1.

    Raises:
        DatasetError: a file cannot be used or holds raw text, too many records are wrong, or no record is
            right.
    """
    conversations: list[Conversation] = []
    errors: list[RecordError] = []
    for item in iterate_dataset(path, format):
        if isinstance(item, RecordError):
            errors.append(item)
        elif isinstance(item, Conversation):
            conversations.append(item)
        else:
            raise DatasetError(f"{path}: raw text, where conversations are wanted")
    dataset = Dataset(conversations, errors, len(conversations) + len(errors))
    shown = [str(error) for error in errors[:ERRORS_SHOWN]]
    check_errors(path, dataset.total, len(errors), shown, max_invalid_fraction)
    return dataset


def iterate_dataset(
    path: str | Path,
    format: DatasetFormat = "auto",  # noqa: A002
) -> Iterator[Item | RecordError]:
    """What each record holds, or an error, in order and without holding a file in memory.

    Raises:
        DatasetError: a file cannot be read, is not JSON, or has a layout that is none of the known ones.
    """
    return map(convert, number_records(parts_of(path, format)))


class NumberedRecord(NamedTuple):
    """A record as it stands in a file.

    Attributes:
        source: the file.
        number: its number, from 1.
        line: where it begins, from 1.
        content: what JSON makes of it, or a `BrokenRecord`.
        layout: the name of its layout; None where the record is no object.
        times: how often it is taken.
    """

    source: str
    number: int
    line: int
    content: Any
    layout: str | None
    times: int = 1


def number_records(parts: Iterable[DataPart]) -> Iterator[NumberedRecord]:
    """Records of some files in order, not checked yet: `convert` may do that in another process.

    Raises:
        DatasetError: as `iterate_dataset`.
    """
    for part in parts:
        if part.format not in get_args(DatasetFormat):
            known = ", ".join(get_args(DatasetFormat))
            raise ValueError(f"format: {part.format!r} is not one of {known}")
        for number, (line, content, layout) in enumerate(_records_of(part), start=1):
            times = math.floor(number * part.weight) - math.floor((number - 1) * part.weight)
            yield NumberedRecord(str(part.path), number, line, content, layout, times)


def _records_of(part: DataPart) -> Iterator[tuple[int, Any, str | None]]:
    """Line, content and layout of each record."""
    if _is_plain_text(part):
        yield from ((line, {"text": text}, "text") for line, text in _pieces(part.path))
        return
    layout = None if part.format == "auto" else str(part.format)
    for number, (line, record) in enumerate(read_records(part.path), start=1):
        if isinstance(record, dict):
            layout = layout or _detected(record, part.path, number)
            yield line, record, layout
        else:
            yield line, record, None


def _is_plain_text(part: DataPart) -> bool:
    """Whether a file is text and no JSON: by its name, and by its beginning where nobody said what it is."""
    if not part.path.name.removesuffix(".gz").endswith(".txt") or part.format not in ("auto", "text"):
        return False
    if part.format == "text":
        return True
    with reading(part.path) as file:
        return not file.read(TEXT_PIECE).lstrip().startswith(("[", "{"))


def _pieces(path: Path) -> Iterator[tuple[int, str]]:
    """A plain text, cut at line ends where it is long, each piece with its first line."""
    with reading(path) as file:
        first, size, held = 1, 0, list[str]()
        for number, line in enumerate(file, start=1):
            if size >= TEXT_PIECE:
                yield first, "".join(held)
                first, size, held = number, 0, []
            held.append(line)
            size += len(line)
        yield first, "".join(held)


def convert(record: NumberedRecord, preferences: bool = False) -> Item | RecordError:
    """What a record holds, or what is wrong with it; a `Preference` where those are asked for."""
    source, number, line, content, layout, _ = record
    if layout is not None:
        return _convert(content, "preference" if preferences else layout, record)
    if isinstance(content, BrokenRecord):
        return RecordError(source, number, None, content.problem)
    return RecordError(source, number, None, f"must be an object, not {kind(content)}", line)


def _convert(content: Mapping[str, Any], wanted: str, record: NumberedRecord) -> Item | RecordError:
    source, number, line = record.source, record.number, record.line
    try:
        if wanted == "preference":
            return read_preference(content, str(record.layout))
        if wanted == "text":
            return Document(read_text(content), source, number)
        dialogue = READERS[wanted](content)
        return Conversation.of_turns(dialogue.turns, dialogue.system, source=source, record=number)
    except MessageError as error:
        name = content.get("id")
        return RecordError(source, number, None if name is None else str(name)[:_ID_SHOWN], str(error), line)


def _detected(record: Mapping[str, Any], file: Path, number: int) -> str:
    layout = detect(record)
    if layout is None:
        fields = ", ".join(sorted(record)[:10]) or "none"
        raise DatasetError(
            f"{file}, record {number}: the layout cannot be told from its fields ({fields}); FastChat and "
            "ShareGPT have conversations, OpenAI has messages, Alpaca and BELLE have instruction and output, "
            "raw text has text"
        )
    return layout


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
