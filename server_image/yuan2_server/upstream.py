"""The API server's side of FastChat's protocol: asks the controller for a worker, and the worker for an
answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp

from yuan2_server.openai_errors import OpenAIError, from_worker, model_not_found, no_worker
from yuan2_server.protocol import DELIMITER, ErrorCode

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 3
"""Workers that are tried before a request fails."""
CONNECT_SECONDS = 5.0
CONTROLLER_SECONDS = 10.0
REFRESH_SECONDS = 2.0
"""Between two refreshes of the controller: it asks every worker in turn and answers nobody meanwhile."""
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

    def __init__(self, controller_url: str, served_name: str) -> None:
        self._controller_url = controller_url.rstrip("/")
        self._served_name = served_name
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds())
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        self._refreshed = 0.0

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def models(self) -> list[str]:
        """Names that the controller knows a worker for, sorted. Raises OpenAIError (503) when it does not
        answer."""
        return sorted((await self._ask_controller("/list_models", {}))["models"])

    async def details(self, address: str, model: str) -> dict[str, Any]:
        """A worker's `/model_details`. Raises WorkerGoneError."""
        return await self._ask_worker(address, "/model_details", {"model": model})

    async def count_tokens(self, address: str, model: str, prompt: str) -> int:
        """Tokens of a prompt text, as the worker counts. Raises WorkerGoneError."""
        return int(
            (await self._ask_worker(address, "/count_token", {"model": model, "prompt": prompt}))["count"]
        )

    async def generate(self, params: dict[str, Any]) -> WorkerAnswer:
        """Start an answer and wait for its first document. Iterate the answer to its end, or close it.

        Raises:
            OpenAIError: no worker for the model, or the request was refused.
        """
        return await self._on_some_worker(params["model"], lambda address: self._start(address, params))

    async def embed(self, model: str, texts: Sequence[str], encoding: str) -> dict[str, Any]:
        """A worker's vectors (`embedding`) and the tokens they took (`token_num`).

        Raises:
            OpenAIError: no worker for the model, or the request was refused.
        """
        body = {"model": model, "input": list(texts), "encoding_format": encoding}

        async def ask(address: str) -> dict[str, Any]:
            document = await self._ask_worker(address, "/worker_get_embeddings", body)
            _raise_error(document, model, "input")
            return document

        return await self._on_some_worker(model, ask)

    async def _on_some_worker(self, model: str, call: Callable[[str], Awaitable[T]]) -> T:
        """The result of `call(address)` for a worker of the model.

        A worker that cannot be reached, or is full, is left for another as long as nothing was received from
        it.
        """
        tried: set[str] = set()
        last: OpenAIError | None = None
        for _ in range(ATTEMPTS):
            address = await self._worker_for(model)
            if address in tried:
                break
            tried.add(address)
            try:
                return await call(address)
            except WorkerGoneError as error:
                log.warning("worker %s: %s", address, error)
                last = OpenAIError(503, f"The worker for `{model}` cannot be reached.", code="no_worker")
                await self._refresh()
            except _RefusedError as error:
                last = error.error
        raise last or no_worker(model)

    async def _start(self, address: str, params: dict[str, Any]) -> WorkerAnswer:
        completed = await self._complete(address, params)
        documents = self._documents(address, completed)
        try:
            first = await anext(documents)
            _raise_error(first, params["model"], "messages")
        except BaseException:
            await documents.aclose()
            raise
        return WorkerAnswer(first, documents, params["model"])

    async def _complete(self, address: str, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters with what this worker needs: FastChat's own wants a number in `max_new_tokens` that
        fits."""
        if params.get("max_new_tokens") is not None:
            return params
        details = await self.details(address, params["model"])
        if details.get("messages"):
            return params
        used = await self.count_tokens(address, params["model"], params["prompt"])
        return {**params, "max_new_tokens": max(int(details["context_length"]) - used, 1)}

    async def _documents(self, address: str, params: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        buffer = b""
        try:
            async with self._session.post(address + "/worker_generate_stream", json=params) as response:
                if response.status != 200:
                    raise WorkerGoneError(f"answered HTTP {response.status}")
                async for data in response.content.iter_any():
                    buffer += data
                    *documents, buffer = buffer.split(DELIMITER)
                    for document in documents:
                        yield _document(document)
                    if len(buffer) > MAX_DOCUMENT:
                        raise WorkerGoneError("sent a document without end")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise WorkerGoneError(repr(error)) from error
        raise WorkerGoneError("ended its answer early")

    async def _worker_for(self, model: str) -> str:
        address = str((await self._ask_controller("/get_worker_address", {"model": model}))["address"])
        if address:
            return address
        if model == self._served_name:
            raise no_worker(model)
        raise model_not_found(model, await self.models())

    async def _refresh(self) -> None:
        """Let the controller look which workers are still there."""
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            await self._ask_controller("/refresh_all_workers", {})

    async def _ask_controller(self, path: str, body: dict[str, Any]) -> Any:
        timeout = aiohttp.ClientTimeout(total=CONTROLLER_SECONDS)
        try:
            async with self._session.post(
                self._controller_url + path, json=body, timeout=timeout
            ) as response:
                response.raise_for_status()
                return await response.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            log.warning("controller %s%s: %r", self._controller_url, path, error)
            raise OpenAIError(
                503, "The controller does not answer; try again later.", code="no_controller"
            ) from error

    async def _ask_worker(self, address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(address + path, json=body) as response:
                if response.status != 200:
                    raise WorkerGoneError(f"{path} answered HTTP {response.status}")
                document = await response.json(content_type=None)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise WorkerGoneError(repr(error)) from error
        if not isinstance(document, dict):
            raise WorkerGoneError(f"{path} did not answer a JSON object")
        return document


class _RefusedError(Exception):
    """A worker that does not take the request now; `error` is what the client hears if no other does."""

    def __init__(self, error: OpenAIError) -> None:
        super().__init__(error.message)
        self.error = error


def _raise_error(document: dict[str, Any], model: str, prompt: str) -> None:
    """Raise what a worker's first document reports: an OpenAIError, or a _RefusedError when another may
    do."""
    code = document.get("error_code")
    if code:
        error = from_worker(int(code), str(document.get("text", "")), model, prompt)
        raise _RefusedError(error) if code in _ELSEWHERE else error


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        raise WorkerGoneError("sent something that is not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise WorkerGoneError("sent a document without text")
    return document


class WorkerAnswer:
    """An answer under way: an async iterator of documents, up to the one with a finish reason.

    `anext` raises OpenAIError when the worker reports an error or stops too early.
    """

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], model: str) -> None:
        self._next: dict[str, Any] | None = first
        self._rest = rest
        self._model = model
        self._ended = False

    def __aiter__(self) -> WorkerAnswer:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._ended:
            await self.aclose()
            raise StopAsyncIteration
        document = self._next or await self._receive()
        self._next = None
        if document.get("error_code"):
            raise from_worker(document["error_code"], document["text"], self._model)
        self._ended = bool(document.get("finish_reason"))
        return document

    async def aclose(self) -> None:
        """Close the connection, which tells the worker to stop."""
        await self._rest.aclose()

    async def _receive(self) -> dict[str, Any]:
        try:
            return await anext(self._rest)
        except WorkerGoneError as error:
            log.warning("answer broken off: %s", error)
            message = "The worker stopped before the answer was complete."
            raise OpenAIError(500, message, code="worker_failed") from error
