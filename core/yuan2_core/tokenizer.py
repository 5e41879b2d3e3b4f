"""Text to token ids and back, as Yuan 2.0 does it: a SentencePiece model and atomic special tokens around it.

Text between two special tokens is encoded in one piece, each with the model's dummy space in front. The
same rule holds in `transformers`' slow Llama tokenizer, so ids agree with the tools other Yuan users have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from yuan2_core.errors import TokenizerError
from yuan2_core.segments import EncodedText, Ids, SegmentEncoder, id_bytes
from yuan2_core.sentencepiece_model import ModelSpec, read_spec
from yuan2_core.special_tokens import EOD, PAD, SEP, SPECIAL_TOKENS, STRUCTURE
from yuan2_core.tokenizer_files import MODEL_FILE, read_added_tokens, write_tokenizer
from yuan2_core.tokenizer_training import train_model

__all__ = ["Yuan2Tokenizer", "train_tokenizer"]

_SPACE = "\u2581"


class Yuan2Tokenizer:
    """A Yuan 2.0 tokenizer. Immutable; `encode` and `decode` may run in several threads.

    Attributes:
        source: where it was read from, for messages.
        vocab_size: pieces and added tokens together, 134,958 in the published tokenizer.
        eod_id, sep_id, pad_id: ids of `<eod>`, `<sep>`, `<pad>`.
        special_ids: text of every atomic token to its id.
    """

    def __init__(
        self, model: bytes, added_tokens: Mapping[str, int] | None = None, *, source: str = MODEL_FILE
    ) -> None:
        """Set up a tokenizer from a serialized SentencePiece model.

        Args:
            model: content of `tokenizer.model`.
            added_tokens: atomic tokens with fixed ids, as the files beside a model list them.
            source: name for messages.

        Raises:
            TokenizerError: the model cannot be read, rewrites text, or lacks `<eod>`, `<sep>` or `<pad>`.
        """
        self.source = source
        self._model = model
        self._spec, self._processor = _load(model, source)
        self._pieces: list[str] = self._processor.id_to_piece(list(range(len(self._processor))))
        self.special_ids: dict[str, int] = _special_ids(self._processor, added_tokens or {}, source)
        self.vocab_size: int = max(len(self._pieces), 1 + max(self.special_ids.values()))
        self.eod_id: int = self.special_ids[EOD]
        self.sep_id: int = self.special_ids[SEP]
        self.pad_id: int = self.special_ids[PAD]
        self._any_special = _either(self.special_ids)
        self._any_marker = _either(text for text in self.special_ids if text not in STRUCTURE)
        self._bytes = self._bytes_of_tokens()
        self._special = frozenset(self.special_ids.values())
        self._added = dict(added_tokens or {})
        self._encoder = SegmentEncoder(
            model, self._pieces, dummy_prefix=self._spec.dummy_prefix, byte_pairs=self._spec.byte_pairs
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process builds it anew from the same model."""
        return _rebuild, (self._model, self._added, self.source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Yuan2Tokenizer:
        """Read a directory with `tokenizer.model` and the tables of added tokens beside it, or a model alone.

        Raises:
            TokenizerError: no such file, or a file that is not a Yuan 2.0 tokenizer.
        """
        given = Path(path)
        directory, file = (given, given / MODEL_FILE) if given.is_dir() else (None, given)
        try:
            model = file.read_bytes()
        except FileNotFoundError:
            raise TokenizerError(
                f"{file}: no such file; a Yuan 2.0 model directory holds {MODEL_FILE}"
            ) from None
        except OSError as error:
            raise TokenizerError(f"{file}: cannot be read: {error.strerror}") from error
        return cls(model, read_added_tokens(directory) if directory else None, source=str(file))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.model` and the two JSON files that `transformers`' and FastChat's loaders read."""
        write_tokenizer(Path(directory), self._model, self.special_ids)

    def encode(self, text: str, *, structure: bool = True) -> list[int]:
        """Token ids of a text; special tokens in it become their one id.

        Args:
            text: any text that UTF-8 can write.
            structure: with False, `<eod>`, `<sep>` and `<pad>` in the text are ordinary text (what a
                message says cannot end the message); the other special tokens stay atomic.
        """
        ids: list[int] = self.encode_array(text, structure=structure).tolist()
        return ids

    def encode_array(self, text: str, *, structure: bool = True) -> Ids:
        """Token ids of a text as int32; otherwise `encode`."""
        return np.frombuffer(self.encode_bytes(text, structure=structure), dtype=np.int32)

    def encode_bytes(self, text: str, *, structure: bool = True) -> bytes:
        """Token ids of a text as the bytes of int32; otherwise `encode`."""
        return b"".join(
            self._encoder.encode(chunk) if special is None else id_bytes(special)
            for chunk, special in self._split(text, structure)
        )

    def read(self, text: str) -> EncodedText | None:
        """A text encoded once for all its parts (`structure` False); None where a special token is in it."""
        return None if self._any_marker.search(text) else self._encoder.read(text)

    def encode_spans(self, text: str, *, structure: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of a text and, for each, the offset of its first byte in the text's UTF-8.

        A token's bytes end where the next one's begin. The dummy space has no byte in the text: a token
        that is nothing else starts where its successor starts.
        """
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for chunk, special in self._split(text, structure):
            if special is None:
                chunk_ids = np.frombuffer(self._encoder.encode(chunk), dtype=np.int32).tolist()
                ids += chunk_ids
                starts += [offset + start for start in self._starts(chunk_ids, chunk)]
            else:
                ids.append(special)
                starts.append(offset)
            offset += len(chunk.encode())
        return ids, starts

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids: the inverse of `encode`.

        Bytes that are not UTF-8 (a character cut in half) become U+FFFD. An id beyond the vocabulary, as the
        model's padded embedding rows allow, has no text.
        """
        out = bytearray()
        fresh = self._spec.dummy_prefix
        for token in ids:
            piece = self.piece_bytes(token)
            if token in self._special:
                out += b"" if skip_special_tokens else piece
                fresh = self._spec.dummy_prefix
            elif piece:
                out += piece[1:] if fresh and piece[:1] == b" " else piece
                fresh = False
        return out.decode(errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token.

        A word's leading space is included; a byte token gives its byte, a special token its text. An id at or
        beyond `vocab_size` gives nothing.

        Raises:
            ValueError: the id is negative.
        """
        if token < 0:
            raise ValueError(f"token id {token} is negative")
        return self._bytes[token] if token < len(self._bytes) else b""

    @property
    def model_bytes(self) -> bytes:
        """Content of `tokenizer.model`."""
        return self._model

    @property
    def dummy_prefix(self) -> bool:
        """Whether a text's first token carries a space that is not in the text."""
        return self._spec.dummy_prefix

    def _bytes_of_tokens(self) -> list[bytes]:
        """UTF-8 of every id; none for control pieces and for ids between the pieces and an added token."""
        tokens = list(range(len(self._pieces)))
        table = [piece.replace(_SPACE, " ").encode() for piece in self._pieces]
        for token in compress(tokens, self._processor.is_byte(tokens)):
            table[token] = bytes([int(self._pieces[token][1:-1], 16)])
        silent = (self._processor.is_control(tokens), self._processor.is_unknown(tokens))
        for token in chain.from_iterable(compress(tokens, flags) for flags in silent):
            table[token] = b""
        table += [b""] * (self.vocab_size - len(table))
        for text, token in self.special_ids.items():
            table[token] = text.encode()
        return table

    def _split(self, text: str, structure: bool) -> Iterator[tuple[str, int | None]]:
        """The text in order: stretches of ordinary text (with None) and special tokens (with their id)."""
        pattern = self._any_special if structure else self._any_marker
        position = 0
        for match in pattern.finditer(text):
            if match.start() > position:
                yield text[position : match.start()], None
            yield match.group(), self.special_ids[match.group()]
            position = match.end()
        if position < len(text):
            yield text[position:], None

    def _starts(self, ids: Sequence[int], text: str) -> list[int]:
        """Byte offset of each token of a stretch that the SentencePiece model encoded in one piece."""
        dummy = 1 if self._spec.dummy_prefix else 0
        if _SPACE not in text:
            ends = list(accumulate((len(self._bytes[token]) for token in ids), initial=-dummy))
            self._check_spelling(ends[-1], len(text.encode()), text)
            return [max(end, 0) for end in ends[:-1]]
        # A literal U+2581 looks like a space in a piece: count in the escaped text, where both have 3 bytes.
        width = len(_SPACE.encode())
        ends = list(accumulate((self._escaped_width(token) for token in ids), initial=-dummy * width))
        offsets = _offsets_in_escaped(text)
        self._check_spelling(ends[-1], len(offsets), text)
        return [offsets[max(end, 0)] for end in ends[:-1]]

    def _escaped_width(self, token: int) -> int:
        piece = self._bytes[token]
        return len(piece) if len(piece) == 1 and piece != b" " else len(self._pieces[token].encode())

    def _check_spelling(self, spelled: int, written: int, text: str) -> None:
        if spelled != written:
            raise TokenizerError(
                f"{self.source}: its pieces spell {spelled} bytes of a text of {written} ({text[:40]!r}); "
                "this tokenizer does not keep text as it is and cannot be used"
            )


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Yuan2Tokenizer:
    """Train a small tokenizer with Yuan 2.0's special tokens and settings, and write it.

    The same texts give the same file. Special tokens spelled in the texts are not learned as text.

    Args:
        texts: what the tokenizer should write briefly; any other text still works, byte by byte.
        vocab_size: most ids, the 256 bytes and the special tokens included; a small corpus gives fewer.
        path: `tokenizer.model` to write (a name that ends in `.model`), or a directory for it and the files
            beside it.

    Raises:
        ValueError: no text, or a vocabulary too small for the characters of the texts.
    """
    target = Path(path)
    tokenizer = Yuan2Tokenizer(train_model(texts, vocab_size), source=str(target))
    if target.suffix == ".model":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(tokenizer.model_bytes)
    else:
        tokenizer.save_pretrained(target)
    return tokenizer


def _rebuild(model: bytes, added: Mapping[str, int], source: str) -> Yuan2Tokenizer:
    return Yuan2Tokenizer(model, added, source=source)


def _load(model: bytes, source: str) -> tuple[ModelSpec, Any]:
    """The settings and the processor of a model that spells text as Yuan 2.0's does."""
    try:
        spec = read_spec(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (ValueError, RuntimeError) as error:
        raise TokenizerError(f"{source}: not a SentencePiece model: {error}") from error
    if spec.rewrites_text or not spec.escapes_spaces:
        raise TokenizerError(
            f"{source}: its normalizer changes text before it is encoded; Yuan 2.0's tokenizer keeps text "
            "as it is (identity normalization, no white space removed)"
        )
    if not spec.byte_fallback:
        raise TokenizerError(f"{source}: it has no byte fallback, so some text cannot be written")
    return spec, processor


def _special_ids(processor: Any, added: Mapping[str, int], source: str) -> dict[str, int]:
    """Ids of the atomic tokens: pieces, those listed beside the model, then the rest in Yuan 2.0's order."""
    pieces = len(processor)
    ids = {text: processor.piece_to_id(text) for text in SPECIAL_TOKENS}
    ids = {text: token for text, token in ids.items() if token != processor.unk_id()}
    for text, token in sorted(added.items(), key=lambda item: item[1]):
        is_piece = token < pieces
        if is_piece and processor.id_to_piece(token) != text:
            raise TokenizerError(
                f"{source}: added token {text} has id {token}, "
                f"which is the piece {processor.id_to_piece(token)!r}"
            )
        if token >= pieces + len(added):
            raise TokenizerError(
                f"{source}: added token {text} has id {token}, "
                f"which leaves ids after the {pieces} pieces unused"
            )
        if is_piece and (processor.is_control(token) or processor.is_unknown(token)):
            continue  # <s>, </s>, <unk>: listed by transformers, never part of a Yuan 2.0 text
        ids[text] = token
    for text in STRUCTURE:
        if text not in ids:
            raise TokenizerError(
                f"{source}: has no {text} token, neither as a piece nor as an added token; "
                "use the tokenizer of a Yuan 2.0 model"
            )
    following = max(pieces, 1 + max(ids.values()))
    for text in SPECIAL_TOKENS:
        if text not in ids:
            ids[text] = following
            following += 1
    return ids


def _either(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _offsets_in_escaped(text: str) -> list[int]:
    """For each byte of the text with spaces written U+2581, its offset in the UTF-8 of the text itself."""
    offsets: list[int] = []
    position = 0
    for character in text:
        width = len(character.encode())
        escaped = len(_SPACE.encode()) if character == " " else width
        offsets += [position] * escaped if escaped > width else range(position, position + width)
        position += width
    return offsets
