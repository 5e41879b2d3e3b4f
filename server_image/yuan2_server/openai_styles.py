"""The two styles of OpenAI's completions: chat messages, and plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yuan2_server.completion import Choice, Token
from yuan2_server.upstream import Document

_BYTE_TOKEN = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


class Chat:
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self) -> Document | None:
        """The role, before anything is said."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str, tokens: Sequence[Token], choice: Choice) -> Document:  # noqa: ARG002
        """A delta."""
        logprobs = {"content": chat_logprobs(tokens), "refusal": None} if tokens else None
        return {"delta": {"content": text}, "logprobs": logprobs}

    def closing(self) -> Document:
        """An empty delta."""
        return {"delta": {}, "logprobs": None}

    def whole(self, choice: Choice, *, logprobs: bool) -> Document:
        """The assistant's message."""
        return {
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": {"content": chat_logprobs(choice.tokens), "refusal": None} if logprobs else None,
        }


class PlainText:
    """`/v1/completions`."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def opening(self) -> Document | None:
        """Nothing: text has no role."""
        return None

    def piece(self, text: str, tokens: Sequence[Token], choice: Choice) -> Document:
        """New text; its tokens' places are those in the whole text."""
        start = choice.characters - sum(len(token.text) for token in tokens)
        return {"text": text, "logprobs": text_logprobs(tokens, start) if tokens else None}

    def closing(self) -> Document:
        """No text."""
        return {"text": "", "logprobs": None}

    def whole(self, choice: Choice, *, logprobs: bool) -> Document:
        """The text."""
        return {"text": choice.text, "logprobs": text_logprobs(choice.tokens, 0) if logprobs else None}


def chat_logprobs(tokens: Sequence[Token]) -> list[Document]:
    """Tokens as OpenAI's chat entries."""
    return [
        {
            **_entry(token.text, token.logprob),
            "top_logprobs": [_entry(text, value) for text, value in token.top.items()],
        }
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[Token], start: int) -> Document:
    """Tokens as the arrays of OpenAI's text completions; the first one is at character `start`."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": offsets,
    }


def _entry(token: str, logprob: float) -> Document:
    """A token with its bytes; a worker writes bytes that are no character alone as `<0xE4>`."""
    if _BYTE_TOKEN.fullmatch(token):
        data = bytes(int(pair, 16) for pair in re.findall(r"0x(..)", token))
    else:
        data = token.encode()
    return {"token": token, "logprob": logprob, "bytes": list(data)}
