"""The published tokenizer for transformers: a SentencePiece model and atomic special tokens around it.

Text between two special tokens is encoded in one piece, with the model's dummy space in front. transformers'
own `LlamaTokenizer` is not used: since version 5 it rebuilds the model's merges and joins runs of spaces
differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

from transformers import SentencePieceBackend

EOD, SEP, PAD = STRUCTURE = ("<eod>", "<sep>", "<pad>")
"""Tokens that end a document and a prompt, and fill."""
SPECIAL_TOKENS = (
    *STRUCTURE,
    *("<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
)
"""In the order in which the published set-up adds those that are no pieces of the model: 134953 to 134957."""

MARK = "\ue000"
"""For private use: the chat template puts it behind the `<` of a structure token in a message's own text."""
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

_MARKED = re.compile(f"<{MARK}(?=(?:eod|sep|pad)>)")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


class Yuan2Tokenizer(SentencePieceBackend):
    """Reads `tokenizer.model`; a chat template in the directory takes the place of ours."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers declares it so

    def __init__(self, vocab_file: str, chat_template: str | None = None, **others: Any) -> None:
        roles = {"eos_token": EOD, "sep_token": SEP, "pad_token": PAD, "bos_token": None, "unk_token": None}
        ignored = ("legacy", "add_bos_token", "add_eos_token", "add_prefix_space")
        kept = {name: value for name, value in others.items() if name not in (*roles, *ignored)}
        super().__init__(
            vocab_file=vocab_file,
            chat_template=chat_template or CHAT_TEMPLATE.read_text(encoding="utf-8"),
            **roles,
            **kept,
        )
        self.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
        pieces = range(self.vocab_size)
        self._silent = {
            self._token(i) for i in pieces if self.sp_model.is_control(i) or self.sp_model.is_unknown(i)
        }

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        pieces: list[str] = self.sp_model.encode(_MARKED.sub("<", text), out_type=str)
        return pieces

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool = False) -> list[str]: ...
    def convert_ids_to_tokens(
        self, ids: int | list[int], skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Tokens of ids. A skipped special token leaves an empty one: behind it the dummy space is no text.

        An id without a token, as the model's padded embedding rows allow, is an empty one too.
        """
        if isinstance(ids, int):
            return self._token(ids)
        hidden = set(self.all_special_ids) if skip_special_tokens else set()
        return ["" if token in hidden else self._token(token) for token in map(int, ids)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens. Bytes that are not UTF-8, a character cut in half, become U+FFFD."""
        return b"".join(self._bytes(tokens)).decode(errors="replace")

    def _bytes(self, tokens: Iterable[str]) -> Iterable[bytes]:
        """UTF-8 of each token, without the dummy space at the beginning and after a special token."""
        fresh = True
        for token in tokens:
            if not token or token in self._added_tokens_encoder:
                fresh = True
                yield token.encode()
                continue
            if token in self._silent:
                continue
            byte = _BYTE.fullmatch(token)
            text = token.removeprefix(_SPACE) if fresh else token
            fresh = False
            yield bytes.fromhex(byte[1]) if byte else text.replace(_SPACE, " ").encode()

    def _token(self, token: int) -> str:
        if token in self._added_tokens_decoder:
            return str(self._added_tokens_decoder[token])
        return str(self.sp_model.id_to_piece(token)) if 0 <= token < self.vocab_size else ""
