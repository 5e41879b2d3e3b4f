"""An answer under way: workers' documents become OpenAI's objects, whole or as events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from yuan2_server.choices import Answers, open_answers
from yuan2_server.openai_errors import OpenAIError
from yuan2_server.openai_params import Sampling
from yuan2_server.upstream import Document, Upstream

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting for a worker\n\n"


class Token(NamedTuple):
    """A token of an answer, its log-probability and those of its alternatives."""

    text: str
    logprob: float
    top: dict[str, float]


@dataclass
class Choice:
    """What has been received of one of the answers."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    usage: Document = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    """Only where log-probabilities were asked for."""
    characters: int = 0
    """Of these tokens."""

    def take(self, document: Document) -> tuple[str, list[Token]]:
        """Take the next document; returns the text and the tokens that are new in it."""
        self.finish_reason = document.get("finish_reason")
        self.usage = document.get("usage") or self.usage
        text: str = document["text"]
        if document.get("delta"):
            new_text, self.text = text, self.text + text
            new_tokens = tokens_of(document, 0)
        else:
            if not self.finish_reason:
                # FastChat's own worker sends half a character as U+FFFD and corrects it in the next document.
                text = text.rstrip("\ufffd")
            new_text, self.text = text[len(self.text) :], max(text, self.text, key=len)
            new_tokens = tokens_of(document, len(self.tokens))
        self.tokens += new_tokens
        self.characters += sum(len(token.text) for token in new_tokens)
        return new_text, new_tokens


def tokens_of(document: Document, start: int) -> list[Token]:
    """The tokens of a worker's document from number `start` on; none where it has no log-probabilities."""
    logprobs = document.get("logprobs")
    if not logprobs:
        return []
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [Token(text, value, top or {}) for text, value, top in list(rows)[start:]]


class Style(Protocol):
    """What differs between chat and text completions."""

    kind: str
    """`object` of a whole answer."""
    chunk_kind: str
    """`object` of an event."""
    id_prefix: str

    def opening(self) -> Document | None:
        """What an answer's first event holds beside its index; None when there is no such event."""
        ...

    def piece(self, text: str, tokens: Sequence[Token], choice: Choice) -> Document:
        """What an event with new text holds; `choice` is the answer as it is with it."""
        ...

    def closing(self) -> Document:
        """What the event with the finish reason holds."""
        ...

    def whole(self, choice: Choice, *, logprobs: bool) -> Document:
        """What an answer without a stream holds."""
        ...


@dataclass(frozen=True)
class Completion:
    """A completion under way: its answers have given their first documents, or wait for a worker."""

    request: Sampling
    style: Style
    choices: tuple[Choice, ...]
    answers: Answers
    prompts: int
    spent: Callable[[int, int], None]
    """Told the tokens of prompts and answers at the end."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def close(self) -> None:
        """Give up what is still being generated."""
        await self.answers.close()
        usage = total_usage(self.choices, self.prompts)
        self.spent(usage["prompt_tokens"], usage["completion_tokens"])

    async def whole(self, *, logprobs: bool) -> Document:
        """The answer to a request without `stream`. Raises OpenAIError."""
        async with aclosing(self.answers.documents()) as documents:
            async for index, document in documents:
                if document is not None:
                    self.choices[index].take(document)
        choices = [
            {
                "index": choice.index,
                **self.style.whole(choice, logprobs=logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in self.choices
        ]
        return self._document(self.style.kind, choices, total_usage(self.choices, self.prompts))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the first one is an event too, and the last but `[DONE]`.

        While a worker is busy with other requests, comments keep the connection alive.
        """
        opening = self.style.opening()
        if opening is not None:
            for choice in self.choices:
                yield self._event(choice.index, opening)
        try:
            async with aclosing(self.answers.documents()) as documents:
                async for index, document in documents:
                    if document is None:
                        yield WAITING
                        continue
                    for event in self._events_of(self.choices[index], document):
                        yield event
        except OpenAIError as error:
            yield _sse(error.body())
        else:
            if self.request.wants_usage:
                usage = total_usage(self.choices, self.prompts)
                yield _sse(self._document(self.style.chunk_kind, [], usage))
        yield DONE

    def _events_of(self, choice: Choice, document: Document) -> list[bytes]:
        text, tokens = choice.take(document)
        events = [self._event(choice.index, self.style.piece(text, tokens, choice))] if text or tokens else []
        if choice.finish_reason:
            events.append(self._event(choice.index, self.style.closing(), choice.finish_reason))
        return events

    def _event(self, index: int, content: Document, finish_reason: str | None = None) -> bytes:
        entry = {"index": index, **content, "finish_reason": finish_reason}
        return _sse(self._document(self.style.chunk_kind, [entry]))

    def _document(self, kind: str, choices: list[Document], usage: Document | None = None) -> Document:
        document = {
            "id": self.style.id_prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        return {**document, "usage": usage} if usage or self.request.wants_usage else document


async def open_completion(
    upstream: Upstream,
    request: Sampling,
    style: Style,
    spent: Callable[[int, int], None],
    prompts: int = 1,
) -> Completion:
    """Start `n` answers to each of the prompts.

    Raises OpenAIError when one of them cannot start; the others are given up.
    """
    indices = range(prompts * request.n)
    answers = await open_answers(upstream, [request.worker_params(index) for index in indices])
    return Completion(request, style, tuple(map(Choice, indices)), answers, prompts, spent)


def total_usage(choices: tuple[Choice, ...], prompts: int = 1) -> Document:
    """Tokens of the whole request: each prompt once, and every choice's answer."""
    each = len(choices) // prompts
    groups = [choices[start : start + each] for start in range(0, len(choices), each)]
    prompt = sum(max(choice.usage.get("prompt_tokens", 0) for choice in group) for group in groups)
    completion = sum(choice.usage.get("completion_tokens", 0) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _sse(document: Document) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"
