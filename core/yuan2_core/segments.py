"""Encodes text in small segments that are remembered, with the very result of encoding it in one piece.

Byte-pair encoding joins neighbours into pieces of its vocabulary only. Where no piece holds two characters
side by side, nothing is ever joined across them: both sides are encoded as if the other were not there. Such
a border comes before nearly every word, and words repeat: most of a text costs a look-up each.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from yuan2_core.sentencepiece_model import without_dummy_prefix

Ids = NDArray[np.int32]

BYTES_OF_ID: Final = 4
_SPACE: Final = 0x2581
"""What a space is written as in pieces."""
_TABLE_BITS: Final = 20
"""Size of the table of neighbours: 1 MiB; two pairs that share a place only hide a border."""
_SHORT: Final = 64
"""Characters up to which a text is one segment: encoding it costs less than looking for its borders."""
_REMEMBERED_LENGTH: Final = 32
"""Characters of the longest segment that is remembered."""
_REMEMBERED: Final = 1 << 16
"""Segments that are remembered, some 20 MB."""


class _Memory(dict[str, bytes]):
    """A segment to its ids (int32), encoded when it is first asked for."""

    def __init__(self, encode: Any) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, segment: str) -> bytes:
        ids = np.asarray(self._encode(segment), dtype=np.int32).tobytes()
        if len(segment) <= _REMEMBERED_LENGTH and len(self) < _REMEMBERED:
            self[segment] = ids
        return ids


class SegmentEncoder:
    """Encodes ordinary text, with no special token in it, exactly as the SentencePiece model does."""

    def __init__(self, model: bytes, pieces: Iterable[str], *, dummy_prefix: bool, byte_pairs: bool) -> None:
        """Prepare the table of neighbours.

        Args:
            model: a serialized model that keeps text as it is.
            pieces: its vocabulary.
            dummy_prefix: whether it puts a space in front of a text.
            byte_pairs: whether it is of the BPE kind; another one has no borders.
        """
        processor = sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(model))
        self._memory = _Memory(processor.encode)
        self._prefix = " " if dummy_prefix else ""
        self._neighbours = np.full(1 << _TABLE_BITS, not byte_pairs)
        if byte_pairs:
            # The line end that parts the pieces makes pairs of its own, which only hide borders.
            self._neighbours[_places(_code_points("\n".join(pieces)))] = True

    def encode(self, text: str) -> bytes:
        """Ids of a text as int32 bytes, its dummy space included; nothing for an empty text."""
        return self._raw(self._prefix + text) if text else b""

    def continue_with(self, text: str) -> bytes:
        """Ids of a text that follows a border."""
        return self._raw(text) if text else b""

    def read(self, text: str) -> EncodedText:
        """Encode a text whose parts will be wanted as texts of their own."""
        return EncodedText(self, text)

    def borders(self, text: str) -> list[int]:
        """Characters before which nothing is joined, in order; the first one is not listed."""
        places = _places(_code_points(text))
        found: list[int] = (np.flatnonzero(~self._neighbours[places]) + 1).tolist()
        return found

    def segments(self, text: str, borders: Sequence[int]) -> list[bytes]:
        """Ids of the stretches between the borders, as int32 bytes."""
        cuts = (text[first:last] for first, last in zip([0, *borders], [*borders, len(text)], strict=True))
        return list(map(self._memory.__getitem__, cuts))

    def _raw(self, text: str) -> bytes:
        if len(text) <= _SHORT:
            return self._memory[text]
        return b"".join(self.segments(text, self.borders(text)))


class EncodedText:
    """A text encoded once, of which any part can be had as if that part were encoded alone."""

    def __init__(self, encoder: SegmentEncoder, text: str) -> None:
        self._encoder = encoder
        self._text = text
        self._borders = encoder.borders(text)
        segments = encoder.segments(text, self._borders)
        self._ids = b"".join(segments)
        self._ends = list(accumulate(map(len, segments)))
        """Bytes of ids before each border, and of the whole text."""

    def part(self, first: int, last: int) -> bytes:
        """What `encode(text[first:last])` gives: only what lies beside its first and last border is new."""
        begin = bisect_right(self._borders, first)
        end = bisect_right(self._borders, last) - 1
        if end <= begin:
            return self._encoder.encode(self._text[first:last])
        head = self._encoder.encode(self._text[first : self._borders[begin]])
        tail = self._encoder.continue_with(self._text[self._borders[end] : last])
        return b"".join((head, self._ids[self._ends[begin] : self._ends[end]], tail))


def id_bytes(token: int) -> bytes:
    """One id as int32 bytes."""
    return token.to_bytes(BYTES_OF_ID, sys.byteorder)


def _code_points(text: str) -> NDArray[np.uint32]:
    """Characters as numbers, spaces as pieces have them."""
    codes: NDArray[np.uint32] = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).copy()
    codes[codes == ord(" ")] = _SPACE
    return codes


def _places(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Place of each pair of neighbours in the table (multiplicative hashing, Knuth)."""
    mixed: NDArray[np.uint32] = codes[:-1] * np.uint32(0x9E3779B1) + codes[1:] * np.uint32(0x85EBCA6B)
    mixed >>= np.uint32(32 - _TABLE_BITS)
    return mixed
