"""The model worker: FastChat's worker protocol in front of the engine."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from yuan2_core.conversation import render_prompt
from yuan2_core.errors import UserError
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_server.engine import Engine
from yuan2_server.metrics import WorkerMetrics
from yuan2_server.protocol import (
    SEP_STYLE_YUAN2,
    Chunk,
    ErrorCode,
    GenerateRequest,
    RequestError,
    Usage,
)
from yuan2_server.sequence import SamplingParams, Sequence
from yuan2_server.stream import Detokenizer, LatestChunk, TextStream, chunks_of, describe_token

KEEPALIVE_SECONDS = 10.0
"""A stream is never silent for longer; FastChat's API server gives up after 100."""


@dataclass(frozen=True)
class ServedModel:
    """What is served: fixed once the weights are loaded."""

    name: str
    """What clients put into `model`."""
    tokenizer: Yuan2Tokenizer
    engine: Engine
    embed: Callable[[list[int]], list[float]]
    """Token ids to one vector; runs on the engine's thread."""
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
        """FastChat's status. A worker that drains serves no model any more."""
        names = [] if self.draining else [self.model.name]
        return {"model_names": names, "speed": 1, "queue_length": self.model.engine.load}

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
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "prompt: Input should be a valid string")
        return {"count": len(await asyncio.to_thread(self.model.tokenizer.encode, prompt)), "error_code": 0}

    async def embeddings(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One vector a text: the mean of the last hidden states, scaled to length 1."""
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise RequestError(
                ErrorCode.VALIDATION_TYPE_ERROR, "input: must be a text that is not empty, or a list of such"
            )
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise RequestError(
                ErrorCode.PARAM_OUT_OF_RANGE, f"encoding_format: {encoding!r} is neither 'float' nor 'base64'"
            )
        batches = [await asyncio.to_thread(self.model.tokenizer.encode, text) for text in texts]
        for ids in batches:
            self._check_fits(len(ids), room_for=0, what="input")
        vectors = [await self._embed(ids) for ids in batches]
        encoded = [_base64(vector) for vector in vectors] if encoding == "base64" else vectors
        return {"embedding": encoded, "token_num": sum(map(len, batches))}

    async def generate(self, body: Mapping[str, Any]) -> Generation:
        """Start a generation. Iterate it to its end, or close it."""
        arrival = time.monotonic()
        try:
            if self.closing:
                raise RequestError(ErrorCode.ENGINE_OVERLOADED, "this worker is shutting down; try again")
            request = GenerateRequest.parse(body, served=(self.model.name,))
            prompt_ids = await asyncio.to_thread(self._prompt_ids, request)
            params = self._sampling_params(request, len(prompt_ids))
            channel = LatestChunk(asyncio.get_running_loop())
            sink = self._text_stream(request, len(prompt_ids), channel)
            sequence = Sequence(tuple(prompt_ids), params, sink)
            self.model.engine.submit(sequence)
        except RequestError:
            self.metrics.requests.labels("refused").inc()
            raise
        first = Chunk(request.prompt or "" if request.echo else "", Usage(len(prompt_ids), 0))
        return Generation(self, sequence, channel, first, arrival)

    def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        tokenizer = self.model.tokenizer
        if request.messages is None:
            ids = tokenizer.encode(request.prompt or "")
        else:
            try:
                ids = render_prompt([message.model_dump() for message in request.messages], tokenizer)
            except UserError as error:
                raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, f"messages: {error}") from error
        if not ids:
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "prompt: must not be empty")
        self._check_fits(len(ids), room_for=1)
        return ids

    def _check_fits(self, tokens: int, *, room_for: int, what: str = "messages") -> None:
        if tokens + room_for > self.model.context_length:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"This model's maximum context length is {self.model.context_length} tokens. However, your "
                f"{what} resulted in {tokens} tokens. Please reduce the length of the {what}.",
            )

    def _sampling_params(self, request: GenerateRequest, prompt_tokens: int) -> SamplingParams:
        room = self.model.context_length - prompt_tokens
        return SamplingParams(
            max_new_tokens=min(request.max_new_tokens or room, room),
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

    def _text_stream(self, request: GenerateRequest, prompt_tokens: int, channel: LatestChunk) -> TextStream:
        tokenizer = self.model.tokenizer
        return TextStream(
            Detokenizer(tokenizer),
            request.stop,
            prompt_tokens,
            channel.publish,
            prefix=request.prompt or "" if request.echo else "",
            describe=None if request.logprobs is None else partial(describe_token, tokenizer),
        )

    async def _embed(self, token_ids: list[int]) -> list[float]:
        return await asyncio.wrap_future(self.model.engine.call(partial(self.model.embed, token_ids)))


class Generation:
    """An answer under way: an async iterator of chunks, the last of which has a finish reason.

    `anext` raises RequestError when the generation fails.
    """

    def __init__(
        self, worker: ModelWorker, sequence: Sequence, channel: LatestChunk, first: Chunk, arrival: float
    ) -> None:
        self._engine = worker.model.engine
        self._metrics = worker.metrics
        self._sequence = sequence
        self._chunks = chunks_of(channel, first, KEEPALIVE_SECONDS)
        self._last = first
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
        if self._waiting and chunk is not self._last:
            self._waiting = False
            self._metrics.first_token_seconds.observe(time.monotonic() - self._arrival)
        self._last = chunk
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
        self._metrics.prompt_tokens.inc(self._last.usage.prompt_tokens)
        self._metrics.completion_tokens.inc(self._last.usage.completion_tokens)
        self._metrics.request_seconds.observe(time.monotonic() - self._arrival)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
