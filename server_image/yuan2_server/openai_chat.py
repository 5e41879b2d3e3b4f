"""One chat completion: OpenAI's request to workers' requests, and workers' documents to OpenAI's answer."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from yuan2_core.conversation import SEPARATOR
from yuan2_core.messages import Dialogue
from yuan2_server.choices import Answers, open_answers
from yuan2_server.openai_errors import OpenAIError
from yuan2_server.openai_types import ChatRequest
from yuan2_server.upstream import Document, Upstream

_BYTE_TOKEN = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
DONE = b"data: [DONE]\n\n"
WAITING = b": waiting for a worker\n\n"


def prompt_text(dialogue: Dialogue) -> str:
    """The prompt as FastChat's `yuan2` template writes it, for workers that do not render messages
    themselves."""
    head = f"{dialogue.system}\n" if dialogue.system else ""
    said = [text for turn in dialogue.turns for text in turn]
    return head + SEPARATOR.join([*said, dialogue.question or ""]) + "<sep>"


def worker_params(request: ChatRequest, index: int) -> Document:
    """The worker's request for choice `index`. With a seed, each choice gets one of its own."""
    params: Document = {
        "model": request.model,
        "prompt": prompt_text(request.dialogue()),
        "messages": [message.plain() for message in request.messages],
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "max_new_tokens": request.longest_answer,
        "stop": list(request.stop),
        "echo": False,
        "clamp": False,
        "deltas": True,
    }
    if request.seed is not None:
        params["seed"] = request.seed + index
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    return params


@dataclass
class Choice:
    """What has been received for one of the `n` answers."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    usage: Document = field(default_factory=dict)
    tokens: list[Document] = field(default_factory=list)
    """OpenAI's logprob entries."""

    def take(self, document: Document) -> tuple[str, list[Document]]:
        """Take the next document; returns the text and the logprob entries that are new in it."""
        self.finish_reason = document.get("finish_reason")
        self.usage = document.get("usage") or self.usage
        text: str = document["text"]
        if document.get("delta"):
            new_text, self.text = text, self.text + text
            new_tokens = chat_logprobs(document.get("logprobs"), 0)
        else:
            if not self.finish_reason:
                # FastChat's own worker sends half a character as U+FFFD and corrects it in the next document.
                text = text.rstrip("\ufffd")
            new_text, self.text = text[len(self.text) :], max(text, self.text, key=len)
            new_tokens = chat_logprobs(document.get("logprobs"), len(self.tokens))
        self.tokens += new_tokens
        return new_text, new_tokens


@dataclass(frozen=True)
class Completion:
    """A chat completion under way: its choices' streams have given their first documents."""

    request: ChatRequest
    choices: tuple[Choice, ...]
    answers: Answers
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def close(self) -> None:
        """Give up what is still being generated."""
        await self.answers.close()

    async def whole(self) -> Document:
        """The answer to a request without `stream`. Raises OpenAIError."""
        async with aclosing(self.answers.documents()) as documents:
            async for index, document in documents:
                if document is not None:
                    self.choices[index].take(document)
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": {"content": choice.tokens, "refusal": None} if self.request.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in self.choices
        ]
        return self._document("chat.completion", choices, usage=total_usage(self.choices))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error after the first one is an event too, and the last but `[DONE]`.

        While a worker is busy with other requests, comments keep the connection alive.
        """
        for choice in self.choices:
            yield self._event(choice, {"role": "assistant", "content": ""})
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
            if self.request.stream_options and self.request.stream_options.include_usage:
                yield _sse(self._document("chat.completion.chunk", [], usage=total_usage(self.choices)))
        yield DONE

    def _events_of(self, choice: Choice, document: Document) -> list[bytes]:
        new_text, new_tokens = choice.take(document)
        events = [self._event(choice, {"content": new_text}, new_tokens)] if new_text or new_tokens else []
        if choice.finish_reason:
            events.append(self._event(choice, {}, finish_reason=choice.finish_reason))
        return events

    def _event(
        self,
        choice: Choice,
        delta: Document,
        tokens: list[Document] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        logprobs = {"content": tokens, "refusal": None} if tokens else None
        entry = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _sse(self._document("chat.completion.chunk", [entry]))

    def _document(self, kind: str, choices: list[Document], usage: Document | None = None) -> Document:
        document = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        wants_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        return {**document, "usage": usage} if usage or wants_usage else document


async def open_completion(upstream: Upstream, request: ChatRequest) -> Completion:
    """Start all choices. Raises OpenAIError when one of them cannot start; the others are given up."""
    answers = await open_answers(upstream, [worker_params(request, index) for index in range(request.n)])
    return Completion(request, tuple(map(Choice, range(request.n))), answers)


def total_usage(choices: tuple[Choice, ...]) -> Document:
    """Tokens of the whole request: the prompt once, and every choice's answer."""
    prompt = max((choice.usage.get("prompt_tokens", 0) for choice in choices), default=0)
    completion = sum(choice.usage.get("completion_tokens", 0) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def chat_logprobs(logprobs: Document | None, start: int) -> list[Document]:
    """FastChat's logprobs from token `start` on, as OpenAI's chat entries."""
    if not logprobs:
        return []
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        {**_entry(token, value), "top_logprobs": [_entry(*pair) for pair in (top or {}).items()]}
        for token, value, top in list(rows)[start:]
    ]


def _entry(token: str, logprob: float) -> Document:
    """A token with its bytes; a worker writes bytes that are no character alone as `<0xE4>`."""
    if _BYTE_TOKEN.fullmatch(token):
        data = bytes(int(pair, 16) for pair in re.findall(r"0x(..)", token))
    else:
        data = token.encode()
    return {"token": token, "logprob": logprob, "bytes": list(data)}


def _sse(document: Document) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"
