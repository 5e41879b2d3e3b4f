"""Records of a JSON file in order, without holding the file in memory.

A file is an array, an array of arrays, or JSON Lines, compressed with gzip or not. A line that is not JSON
spoils one record; an array that is not JSON cannot be read on.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO, cast

from yuan2_core.errors import DatasetError

_CHUNK: Final = 1 << 20
"""Characters read at once from an array."""

_GZIP: Final = b"\x1f\x8b"
"""First bytes of a gzip file (RFC 1952)."""
_SPACE: Final = " \t\r\n"
_CUT_SHORT: Final = "the file ends in the middle of the array; it was cut short"


@dataclass(frozen=True)
class BrokenRecord:
    """A line that is not JSON."""

    problem: str


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Every record of a file, in order: the line it begins in, from 1, and what JSON makes of it, or a
    `BrokenRecord`.

    Raises:
        DatasetError: the file cannot be read, is empty or not UTF-8, or is an array with an error in it.
    """
    with reading(path) as file:
        yield from _records(file, path)


@contextmanager
def reading(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file as text, decompressed if it is gzip's by its first bytes, whatever it is called.

    Raises:
        DatasetError: it cannot be read, is not UTF-8, or is damaged.
    """
    try:
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8 ({_encoding_problem(path)}); convert the file to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path}: damaged gzip file ({error}); compress it again") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, decompressed if it is gzip's."""
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def _records(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    array = _Array(file, path)
    first = array.skip_space()
    if first == "":
        raise DatasetError(f"{path}: empty file; it must hold conversations as a JSON array or JSON Lines")
    if first == "[":
        yield from array.elements()
    elif first == "{":
        file.seek(0)
        yield from _lines(file)
    else:
        raise DatasetError(f"{path}: begins with {first!r}; it must be a JSON array or JSON Lines of objects")


def _lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BrokenRecord(f"line {number} is not JSON: {reason(error)}")


class _Array:
    """Elements of a JSON array, decoded from a window that moves over the file."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._window = ""
        self._at = 0
        self._lines_before = 0
        self._counted = (0, 0)
        """A place of the window up to which line ends were counted, and how many there were."""
        self._count = 0
        self._decoder = json.JSONDecoder()

    def skip_space(self) -> str:
        """The next character that is not white space, not consumed; empty at the end of the file."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in _SPACE:
                    return self._window[self._at]
                self._at += 1
            if not self._more():
                return ""

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Decode element after element, up to the closing bracket and the end of the file."""
        yield from self._list(nested=True)
        if self.skip_space() != "":
            raise self._error("text after the array's closing ]")

    def _list(self, *, nested: bool) -> Iterator[tuple[int, Any]]:
        """The elements of the list that opens here; with `nested`, a list in it stands for its elements."""
        self._at += 1
        following = self.skip_space()
        while following != "]":
            if nested and self.skip_space() == "[":
                yield from self._list(nested=False)
            else:
                self._count += 1
                yield self._line(), self._element()
            following = self.skip_space()
            if following not in {",", "]"}:
                raise self._error(f"{following!r} where , or ] must stand" if following else _CUT_SHORT)
            if following == ",":
                self._at += 1
                self.skip_space()
        self._at += 1

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except (ValueError, RecursionError) as error:
                if self._more():
                    continue
                raise self._undecodable(error) from error
            # A number may go on in the next chunk.
            if end == len(self._window) and self._more():
                continue
            self._at = end
            return value

    def _undecodable(self, error: Exception) -> DatasetError:
        if not isinstance(error, json.JSONDecodeError):
            return self._error(f"not JSON: {reason(error)}")
        if _ends_inside(self._window, error):
            return self._error(_CUT_SHORT)
        self._at = error.pos
        return self._error(f"not JSON: {error.msg}")

    def _error(self, problem: str) -> DatasetError:
        return DatasetError(f"{self._path}, record {self._count}, line {self._line()}: {problem}")

    def _line(self) -> int:
        """The line of the next character; what was counted once is not counted again."""
        place, found = self._counted
        if self._at < place:
            place, found = 0, 0
        self._counted = (self._at, found + self._window.count("\n", place, self._at))
        return 1 + self._lines_before + self._counted[1]

    def _more(self) -> bool:
        """Read on and forget what was decoded; as much as is held or more, so that a long record is not
        read often."""
        chunk = self._file.read(max(_CHUNK, len(self._window) - self._at))
        if not chunk:
            return False
        self._lines_before = self._line() - 1
        self._counted = (0, 0)
        self._window = self._window[self._at :] + chunk
        self._at = 0
        return True


def _ends_inside(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the text of an array is wrong because it stops, be it within a string, a word or an escape."""
    text = text.rstrip(_SPACE)
    if error.pos >= len(text):
        return True
    in_last_word = error.pos >= len(text) - len("\\uffff") or error.msg.startswith("Unterminated string")
    return in_last_word and not text.endswith("]")


def reason(error: Exception) -> str:
    """What is wrong with a JSON text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _encoding_problem(path: Path) -> str:
    """Where a file stops being UTF-8."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                return "UTF-16"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1} is 0x{line[error.start]:02x}"
    return "the file changed while it was read"
