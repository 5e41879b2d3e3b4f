"""The model worker: FastChat's worker protocol in front of the engine."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from yuan2_core.conversation import render_prompt
from yuan2_core.errors import UserError
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_server.engines.seam import Engine
from yuan2_server.metrics import WorkerMetrics
from yuan2_server.protocol import (
    MAX_TEXTS,
    SEP_STYLE_YUAN2,
    Chunk,
    ErrorCode,
    GenerateRequest,
    RequestError,
    Usage,
    check_served,
)
from yuan2_server.sequence import Embedding, SamplingParams, Sequence
from yuan2_server.stream import Detokenizer, Mailbox, TextStream, chunks_of, describe_token

KEEPALIVE_SECONDS = 10.0
"""A stream is never silent for longer; FastChat's API server gives up after 100."""


@dataclass(frozen=True)
class ServedModel:
    """What is served: fixed once the weights are loaded."""

    names: tuple[str, ...]
    """What clients put into `model`: its name, then its aliases."""
    tokenizer: Yuan2Tokenizer
    engine: Engine
    context_length: int
    """Tokens of prompt and answer together."""


class ModelWorker:
    """What the worker's routes do, without HTTP. Every method but `status` raises RequestError."""

    def __init__(self, model: ServedModel, metrics: WorkerMetrics) -> None:
        self.model = model
        self.metrics = metrics
        self.draining = False
        """The controller is told that no model is served here; requests on their way are still taken."""
        self.closing = False
        """No new request is taken."""

    def status(self) -> dict[str, Any]:
        """FastChat's status. A worker that drains, or whose engine is broken, serves no model any more."""
        engine = self.model.engine
        names = [] if self.draining or engine.problem else list(self.model.names)
        return {"model_names": names, "speed": 1, "queue_length": engine.load}

    def conv_template(self) -> dict[str, Any]:
        """FastChat's `yuan2` template, with the ids of this tokenizer."""
        conversation = {
            "name": "yuan2",
            "system_template": "{system_message}",
            "system_message": "",
            "roles": ["user", "assistant"],
            "messages": [],
            "offset": 0,
            "sep_style": SEP_STYLE_YUAN2,
            "sep": "<sep>",
            "sep2": "\n",
            "stop_str": "<eod>",
            "stop_token_ids": [self.model.tokenizer.eod_id],
        }
        return {"conv": conversation}

    async def count_token(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens of a prompt text, special tokens atomic."""
        return {
            "count": len(await asyncio.to_thread(self._encode, body.get("prompt"), "prompt")),
            "error_code": 0,
        }

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids of a text, or of messages as they are asked; FastChat has no such route."""
        if "messages" in body:
            request = GenerateRequest.parse({**body, "prompt": None}, served=self.model.names)
            ids = await asyncio.to_thread(self._prompt_ids, request)
        else:
            ids = await asyncio.to_thread(self._encode, body.get("prompt"), "prompt")
        return {"tokens": ids, "context_length": self.model.context_length, "error_code": 0}

    async def embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One vector a text: the mean of the last hidden states, scaled to length 1. A text may be given as
        its token ids."""
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise RequestError(
                ErrorCode.PARAM_OUT_OF_RANGE,
                f"encoding_format: {encoding!r} is neither 'float' nor 'base64'",
                "encoding_format",
            )
        if isinstance(body.get("model"), str):
            check_served(body["model"], self.model.names)
        texts = await asyncio.to_thread(self._texts, body.get("input"))
        sink = VectorMailbox(asyncio.get_running_loop())
        job = Embedding(texts, sink)
        self._submit(job)
        try:
            vectors = await sink.vectors
        except asyncio.CancelledError:
            self.model.engine.cancel(job)
            self.metrics.requests.labels("cancelled").inc()
            raise
        except RequestError:
            self.metrics.requests.labels("failed").inc()
            raise
        tokens = sum(map(len, texts))
        self.metrics.requests.labels("embedded").inc()
        self.metrics.prompt_tokens.inc(tokens)
        encoded = [_base64(vector) for vector in vectors] if encoding == "base64" else vectors
        return {"embedding": encoded, "token_num": tokens}

    async def generate(self, body: Mapping[str, Any]) -> Generation:
        """Start a generation. Iterate it to its end, or close it."""
        arrival = time.monotonic()
        try:
            request = GenerateRequest.parse(body, served=self.model.names)
            prompt_ids = await asyncio.to_thread(self._prompt_ids, request)
            params = self._sampling_params(request, len(prompt_ids))
            mailbox = Mailbox(asyncio.get_running_loop())
            sequence = Sequence(
                tuple(prompt_ids),
                params,
                self._text_stream(request, len(prompt_ids), mailbox),
                model=request.model,
            )
        except RequestError:
            self.metrics.requests.labels("refused").inc()
            raise
        self._submit(sequence)
        return Generation(self, sequence, mailbox, Usage(len(prompt_ids), 0), arrival)

    def _submit(self, work: Sequence | Embedding) -> None:
        try:
            if self.closing:
                raise RequestError(ErrorCode.ENGINE_OVERLOADED, "this worker is shutting down; try again")
            self.model.engine.submit(work)
        except RequestError:
            self.metrics.requests.labels("refused").inc()
            raise

    def _encode(self, text: Any, field: str) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(
                ErrorCode.VALIDATION_TYPE_ERROR, f"{field}: Input should be a valid string", field
            )
        return self.model.tokenizer.encode(text)

    def _texts(self, given: Any) -> tuple[tuple[int, ...], ...]:
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list) or not 0 < len(items) <= MAX_TEXTS:
            message = f"input: must be a text that is not empty, or a list of 1 to {MAX_TEXTS} such"
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, message, "input")
        texts = [
            self._own_ids(item) if isinstance(item, list) else self._encode(item, "input") for item in items
        ]
        for ids in texts:
            if not ids:
                message = "input: a text must have at least one token"
                raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, message, "input")
            self._check_fits(len(ids), room_for=0, what="input")
        return tuple(map(tuple, texts))

    def _own_ids(self, ids: Iterable[Any]) -> list[int]:
        vocabulary = self.model.tokenizer.vocab_size
        checked = [token for token in ids if type(token) is int and 0 <= token < vocabulary]
        if len(checked) != len(list(ids)):
            message = f"token ids are whole numbers from 0 to {vocabulary - 1}"
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, message, "input")
        return checked

    def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        tokenizer = self.model.tokenizer
        if request.messages is not None:
            try:
                ids = render_prompt([message.model_dump() for message in request.messages], tokenizer)
            except UserError as error:
                message = f"messages: {error}"
                raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, message, "messages") from error
        elif request.prompt_ids is not None:
            ids = self._own_ids(request.prompt_ids)
        else:
            ids = tokenizer.encode(request.prompt or "")
        if not ids:
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "prompt: must not be empty", "prompt")
        self._check_fits(len(ids), room_for=1, what="prompt" if request.messages is None else "messages")
        return ids

    def _check_fits(self, tokens: int, *, room_for: int, what: str) -> None:
        if tokens + room_for > self.model.context_length:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"This model's maximum context length is {self.model.context_length} tokens. However, your "
                f"{what} resulted in {tokens} tokens. Please reduce the length of the {what}.",
                what,
            )

    def _longest_answer(self, request: GenerateRequest, prompt_tokens: int) -> int:
        room = self.model.context_length - prompt_tokens
        wanted = request.max_new_tokens
        if wanted is not None and wanted > room and not request.clamp:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"This model's maximum context length is {self.model.context_length} tokens. However, you "
                f"requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the "
                "completion). Please reduce the prompt or the completion's length.",
                "max_new_tokens",
            )
        return min(wanted or room, room)

    def _sampling_params(self, request: GenerateRequest, prompt_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self._longest_answer(request, prompt_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(request.top_k, 0),
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=request.seed,
            logprobs=request.logprobs,
            stop_token_ids=frozenset((self.model.tokenizer.eod_id, *request.stop_token_ids)),
        )

    def _text_stream(self, request: GenerateRequest, prompt_tokens: int, mailbox: Mailbox) -> TextStream:
        tokenizer = self.model.tokenizer
        return TextStream(
            Detokenizer(tokenizer),
            request.stop,
            prompt_tokens,
            mailbox.publish,
            prefix=self._prompt_text(request) if request.echo else "",
            describe=None if request.logprobs is None else partial(describe_token, tokenizer),
        )

    def _prompt_text(self, request: GenerateRequest) -> str:
        if request.prompt_ids is None:
            return request.prompt or ""
        return self.model.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)


class VectorMailbox:
    """The sink of an embedding: carries its vectors from the engine's thread to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.vectors: asyncio.Future[list[list[float]]] = loop.create_future()

    def finish(self, vectors: list[list[float]]) -> None:
        """Hand them over; from any thread."""
        self._later(lambda: self.vectors.set_result(vectors))

    def fail(self, error: RequestError) -> None:
        """Hand over the error instead; from any thread."""
        self._later(lambda: self.vectors.set_exception(error))

    def _later(self, settle: Callable[[], None]) -> None:
        def unless_given_up() -> None:
            if not self.vectors.done():
                settle()

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(unless_given_up)


class Generation:
    """An answer under way: an async iterator of chunks, the last of which has a finish reason.

    `anext` raises RequestError when the generation fails.
    """

    def __init__(
        self, worker: ModelWorker, sequence: Sequence, mailbox: Mailbox, usage: Usage, arrival: float
    ) -> None:
        self._engine = worker.model.engine
        self._metrics = worker.metrics
        self._sequence = sequence
        self._chunks = chunks_of(mailbox, Chunk("", usage), KEEPALIVE_SECONDS)
        self._usage = usage
        self._arrival = arrival
        self._waiting = True
        self._ended = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await anext(self._chunks)
        except RequestError:
            self._end("failed")
            raise
        if self._waiting and chunk.usage.completion_tokens:
            self._waiting = False
            self._metrics.first_token_seconds.observe(time.monotonic() - self._arrival)
        self._usage = chunk.usage
        if chunk.finish_reason is not None:
            self._end(chunk.finish_reason)
        return chunk

    async def aclose(self) -> None:
        """Give up what has not been generated yet."""
        if not self._ended:
            self._engine.cancel(self._sequence)
            self._end("cancelled")

    def _end(self, outcome: str) -> None:
        self._ended = True
        self._metrics.requests.labels(outcome).inc()
        self._metrics.prompt_tokens.inc(self._usage.prompt_tokens)
        self._metrics.completion_tokens.inc(self._usage.completion_tokens)
        self._metrics.request_seconds.observe(time.monotonic() - self._arrival)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
