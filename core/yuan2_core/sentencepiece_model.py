"""What a SentencePiece model file says about itself, and how to append pieces to it.

The file is one protocol buffer, `ModelProto` of sentencepiece_model.proto. Its field 1 repeats the pieces
(1: text, 2: score, 3: type), field 2 is the trainer's specification (3: kind of model,
35: byte fallback) and field 3 the
normalizer's (2: character map, 3: add a dummy space in front, 4: squeeze white space, 5: write a space as
U+2581). Reading these few by hand spares the protobuf package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
_FIXED_SIZE = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class ModelSpec:
    """The settings that decide whether pieces spell the text they were made from."""

    byte_fallback: bool
    """Characters outside the vocabulary become bytes, so that any text can be written."""
    rewrites_text: bool
    """Characters are changed (NFKC and the like) or white space is squeezed before pieces are chosen."""
    dummy_prefix: bool
    """A space is put in front of every text."""
    escapes_spaces: bool
    """A space is written U+2581 in pieces."""
    byte_pairs: bool
    """Pieces are joined from smaller ones (BPE), not chosen as the likeliest whole (unigram)."""


def read_spec(model: bytes) -> ModelSpec:
    """Read the settings of a serialized SentencePiece model.

    Raises:
        ValueError: the bytes are not a `ModelProto`.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] | None = None
    for number, value in _fields(model):
        if number == _TRAINER and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == _NORMALIZER and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if normalizer is None:
        raise ValueError("it has no normalizer specification")
    return ModelSpec(
        byte_fallback=bool(trainer.get(35, 0)),
        rewrites_text=bool(normalizer.get(2, b"")) or bool(normalizer.get(4, 1)),
        dummy_prefix=bool(normalizer.get(3, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
        byte_pairs=trainer.get(3, 1) == _BPE,
    )


def append_pieces(model: bytes, pieces: Iterable[str]) -> bytes:
    """Add normal pieces with score 0 after the last one, as the published model has its special tokens.

    Such a piece is never chosen for text unless merges lead to it; only its id is used.
    """
    return model + b"".join(_message(_PIECES, _piece(piece.encode())) for piece in pieces)


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model, but with no space put in front of a text.

    A field that comes again is merged over the one before it.
    """
    return model + _message(_NORMALIZER, bytes([3 << 3 | _VARINT, 0]))


def _piece(text: bytes) -> bytes:
    normal = 1
    score = bytes([2 << 3 | _FIXED32]) + struct.pack("<f", 0.0)
    return _message(1, text) + score + bytes([3 << 3 | _VARINT, normal])


def _message(number: int, body: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _to_varint(len(body)) + body


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and raw values of one message, in the order of the wire."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in _FIXED_SIZE:
            size = _FIXED_SIZE[wire]
        else:
            raise ValueError(f"byte {position} is not part of a SentencePiece model")
        if position + size > len(message):
            raise ValueError("it ends in the middle of a field")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("it ends in the middle of a number")
