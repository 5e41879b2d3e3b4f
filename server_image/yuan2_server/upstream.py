"""The API server's side of FastChat's protocol: asks the controller for a worker, and the worker for an
answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp

from yuan2_server.controller import Controller
from yuan2_server.openai_errors import OpenAIError, from_worker, invalid, model_not_found, no_worker
from yuan2_server.protocol import DELIMITER, ErrorCode
from yuan2_server.requests import forwarded

log = logging.getLogger(__name__)

Document = dict[str, Any]

ATTEMPTS = 3
"""Tries, on whatever workers, before a request fails."""
AGAIN_SECONDS = 0.2
"""Before the only worker there is is tried once more."""
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""How long a connection is kept for the next request. FastChat's programs close theirs after 5 s: a request
that goes out just then is lost."""
EMBEDDING_SECONDS = 600.0
"""Longest wait for vectors, of which nothing is sent before the last one is there."""
MAX_DOCUMENT = 64 * 2**20
"""Bytes of one document that a worker may send."""
_ELSEWHERE = frozenset({ErrorCode.RATE_LIMIT, ErrorCode.QUOTA_EXCEEDED, ErrorCode.ENGINE_OVERLOADED})
"""Errors that say only that this worker does not take the request now."""


def silence_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """Longest silence of a worker inside an answer, from FastChat's variable (default 100)."""
    return float(environment.get("FASTCHAT_WORKER_API_TIMEOUT") or 100)


class WorkerGoneError(Exception):
    """A worker that could not be reached, or answered with something else than FastChat's protocol."""


class Upstream:
    """FastChat's controller and its workers. One for a process; close it at the end."""

    def __init__(self, controller_url: str, served_names: Sequence[str]) -> None:
        self._served_names = served_names
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds())
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        self._controller = Controller(self._session, controller_url)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models that have a worker, sorted. Raises OpenAIError (503) when nobody knows."""
        return await self._controller.models()

    async def generate(self, params: Document) -> AsyncGenerator[Document | None, None]:
        """Documents of one answer, the last with its finish reason; None while it waits for its first token.

        Until there is a token, a worker that is lost or full is left for another one.

        Raises:
            OpenAIError: no worker for the model, the request was refused, or the worker was lost later.
        """
        tries = _Tries(self, params["model"])
        while True:
            address = await tries.next()
            started = False
            try:
                async with aclosing(self._documents(address, params)) as documents:
                    async for document in documents:
                        _raise_error(document, params["model"], "messages", started=started)
                        started = started or _has_token(document, params)
                        yield document if started else None
                return
            except WorkerGoneError as error:
                if started:
                    log.warning("answer broken off: %s", error)
                    message = "The worker stopped before the answer was complete."
                    raise OpenAIError(500, message, code="worker_failed") from error
                tries.gone(address, error)
            except _RefusedError as error:
                tries.refused(address, error.error)

    async def embed(self, model: str, inputs: Sequence[str | list[int]], encoding: str) -> Document:
        """A worker's vectors (`embedding`) and the tokens they took (`token_num`).

        Raises:
            OpenAIError: no worker for the model, the request was refused, or it took too long.
        """
        body = {"model": model, "input": list(inputs), "encoding_format": encoding}
        return await self._ask_some_worker("/worker_get_embeddings", body, "input")

    async def tokenize(self, body: Document) -> Document:
        """A worker's `tokens` of a prompt or of messages, and its `context_length`. Raises OpenAIError."""
        return await self._ask_some_worker("/tokenize", body, "prompt")

    async def _ask_some_worker(self, path: str, body: Document, prompt: str) -> Document:
        tries = _Tries(self, body["model"])
        while True:
            address = await tries.next()
            try:
                timeout = aiohttp.ClientTimeout(total=EMBEDDING_SECONDS, sock_connect=CONNECT_SECONDS)
                document = await self._ask_worker(address, path, body, timeout)
                _raise_error(document, body["model"], prompt)
                return document
            except WorkerGoneError as error:
                if isinstance(error.__cause__, asyncio.TimeoutError) and not _unreached(error.__cause__):
                    # The worker is busy with it: another one would be as long.
                    raise OpenAIError(504, "The worker took too long.", code="worker_timeout") from error
                tries.gone(address, error)
            except _RefusedError as error:
                tries.refused(address, error.error)

    async def _complete(self, address: str, params: Document) -> Document:
        """Parameters with what this worker needs: FastChat's own wants a number in `max_new_tokens` that
        fits."""
        if params.get("max_new_tokens") is not None and "prompt_ids" not in params:
            return params
        details = await self._ask_worker(address, "/model_details", {"model": params["model"]})
        if details.get("messages"):
            return params
        if "prompt_ids" in params:
            raise invalid("prompt", "prompt: the worker of this model takes text only")
        question = {"model": params["model"], "prompt": params["prompt"]}
        used = int((await self._ask_worker(address, "/count_token", question))["count"])
        return {**params, "max_new_tokens": max(int(details["context_length"]) - used, 1)}

    async def _documents(self, address: str, params: Document) -> AsyncGenerator[Document, None]:
        """A worker's documents up to the one with a finish reason. Raises WorkerGoneError."""
        buffer = b""
        params = await self._complete(address, params)
        try:
            url = address + "/worker_generate_stream"
            async with self._session.post(url, json=params, headers=forwarded()) as response:
                if response.status != 200:
                    raise WorkerGoneError(f"answered HTTP {response.status}")
                async for data in response.content.iter_any():
                    buffer += data
                    *documents, buffer = buffer.split(DELIMITER)
                    for data in documents:  # noqa: PLW2901
                        document = _document(data)
                        yield document
                        if document.get("finish_reason"):
                            return
                    if len(buffer) > MAX_DOCUMENT:
                        raise WorkerGoneError("sent a document without end")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise WorkerGoneError(repr(error)) from error
        raise WorkerGoneError("ended its answer early")

    async def _ask_worker(
        self, address: str, path: str, body: Document, timeout: aiohttp.ClientTimeout | None = None
    ) -> Document:
        try:
            async with self._session.post(
                address + path, json=body, headers=forwarded(), timeout=timeout or self._session.timeout
            ) as response:
                if response.status != 200:
                    raise WorkerGoneError(f"{path} answered HTTP {response.status}")
                document = await response.json(content_type=None)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise WorkerGoneError(repr(error)) from error
        if not isinstance(document, dict):
            raise WorkerGoneError(f"{path} did not answer a JSON object")
        return document

    async def worker_for(self, model: str, tried: set[str]) -> str:
        """Address of a worker, best one that was not tried. Raises OpenAIError when there is none."""
        address = await self._controller.worker(model, tried)
        if address:
            return address
        if model in self._served_names:
            raise no_worker(model)
        raise model_not_found(model, await self.models())

    def avoid(self, address: str) -> None:
        """Prefer other workers for a while."""
        self._controller.avoid(address)


class _Tries:
    """The workers that one request is tried on."""

    def __init__(self, upstream: Upstream, model: str) -> None:
        self._upstream = upstream
        self._model = model
        self._left = ATTEMPTS
        self._refused: set[str] = set()
        self._gone: list[str] = []
        self._error: OpenAIError | None = None

    async def next(self) -> str:
        """The worker to try now. Raises OpenAIError when enough were tried."""
        if not self._left:
            raise self._error or no_worker(self._model)
        self._left -= 1
        address = await self._upstream.worker_for(self._model, {*self._refused, *self._gone})
        if self._error is not None and (address in self._refused or self._gone.count(address) > 1):
            raise self._error
        if address in self._gone:
            await asyncio.sleep(AGAIN_SECONDS)
        return address

    def gone(self, address: str, error: WorkerGoneError) -> None:
        """This one could not be reached, or was lost before its first token."""
        log.warning("worker %s: %s", address, error)
        self._upstream.avoid(address)
        self._gone.append(address)
        message = f"The worker for `{self._model}` cannot be reached."
        self._error = OpenAIError(503, message, code="no_worker")

    def refused(self, address: str, error: OpenAIError) -> None:
        """This one takes no request now."""
        self._refused.add(address)
        self._error = error


class _RefusedError(Exception):
    """A worker that does not take the request now; `error` is what the client hears if no other does."""

    def __init__(self, error: OpenAIError) -> None:
        super().__init__(error.message)
        self.error = error


def _unreached(error: BaseException) -> bool:
    return isinstance(error, aiohttp.ConnectionTimeoutError)


def _raise_error(document: Document, model: str, prompt: str, *, started: bool = False) -> None:
    """Raise what a worker's document reports: an OpenAIError, or a _RefusedError when another may do."""
    code = document.get("error_code")
    if code:
        error = from_worker(document, model, prompt)
        raise _RefusedError(error) if code in _ELSEWHERE and not started else error


def _has_token(document: Document, params: Document) -> bool:
    """Whether there is a token of the answer in it: a worker repeats an empty answer while it is busy."""
    before = params.get("prompt") if params.get("echo") else ""
    generated = (document.get("usage") or {}).get("completion_tokens", 0)
    return bool(generated or document.get("finish_reason")) or document["text"] not in ("", before)


def _document(data: bytes) -> Document:
    try:
        document = json.loads(data)
    except ValueError:
        raise WorkerGoneError("sent something that is not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise WorkerGoneError("sent a document without text")
    return document
