"""The OpenAI-compatible API server in front of FastChat's controller."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuan2_core.contract import ServeJob
from yuan2_server import metrics
from yuan2_server.answers import ClientGoneError, Stream, while_connected
from yuan2_server.auth import KeyDirectory, RequireKey
from yuan2_server.openai_chat import open_completion
from yuan2_server.openai_errors import OpenAIError, invalid, model_not_found
from yuan2_server.openai_types import parse_chat_request, parse_embeddings_request
from yuan2_server.upstream import Upstream

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""nginx's status for a client that left; nobody reads it."""
STARTED = int(time.time())
"""`created` of the models: FastChat's controller does not say since when it knows them."""


class ApiServer:
    """The routes. `stopping` makes /readyz fail while open requests end."""

    def __init__(self, job: ServeJob, upstream: Upstream, keys: KeyDirectory) -> None:
        self._keys = keys if job.api.require_key else None
        self._upstream = upstream
        self._metrics = metrics.ApiMetrics()
        self.stopping = False

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/models", _answering(self._list_models)),
            Route("/v1/models/{model:path}", _answering(self._show_model)),
            Route("/v1/chat/completions", _answering(self._chat), methods=["POST"]),
            Route("/v1/embeddings", _answering(self._embeddings), methods=["POST"]),
            Route("/healthz", _healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._show_metrics),
        ]
        app: ASGIApp = Starlette(
            routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected}
        )
        if self._keys is not None:
            app = RequireKey(app, self._keys)
        return Measured(app, self._metrics, frozenset(route.path for route in routes))

    async def _list_models(self, _: Request) -> Response:
        cards = [_card(name) for name in await self._upstream.models()]
        return JSONResponse({"object": "list", "data": cards})

    async def _show_model(self, request: Request) -> Response:
        name, names = request.path_params["model"], await self._upstream.models()
        if name not in names:
            raise model_not_found(name, names)
        return JSONResponse(_card(name))

    async def _chat(self, request: Request) -> Response:
        chat = parse_chat_request(await _read_object(request))
        chat.dialogue()
        log.info("chat completion: model %s, user %r, %d messages", chat.model, chat.user, len(chat.messages))
        completion = await while_connected(request, open_completion(self._upstream, chat))
        if chat.stream:
            return Stream(completion.events(), "text/event-stream", completion.close)
        try:
            return JSONResponse(await while_connected(request, completion.whole()))
        finally:
            await completion.close()

    async def _embeddings(self, request: Request) -> Response:
        asked = parse_embeddings_request(await _read_object(request))
        log.info("embeddings: model %s, user %r, %d texts", asked.model, asked.user, len(asked.input))
        work = self._upstream.embed(asked.model, asked.input, asked.encoding_format)
        answer = await while_connected(request, work)
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(answer["embedding"])
        ]
        usage = {"prompt_tokens": answer["token_num"], "total_tokens": answer["token_num"]}
        return JSONResponse({"object": "list", "model": asked.model, "data": data, "usage": usage})

    async def _readyz(self, _: Request) -> Response:
        problem = self._not_ready()
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    def _not_ready(self) -> str:
        """Workers do not count: without one, clients get OpenAI's 503 instead of a refused connection."""
        if self.stopping:
            return "the server is shutting down"
        if self._keys is not None and not self._keys.keys():
            return "there is no API key: every request would be refused"
        return ""

    async def _show_metrics(self, _: Request) -> Response:
        return metrics.render(self._metrics.registry)


class Measured:
    """ASGI middleware: counts requests and the time until their answers are complete."""

    def __init__(self, app: ASGIApp, counters: metrics.ApiMetrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = counters
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._paths else "other"
        status, started = CLIENT_GONE, time.monotonic()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, watch)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started)


def _answering(call: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A route whose OpenAIError becomes OpenAI's error body."""

    async def route(request: Request) -> Response:
        try:
            return await call(request)
        except OpenAIError as error:
            return error.response()
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)

    return route


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "fastchat", "root": name}


async def _read_object(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise invalid(None, "We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise invalid(None, "The body of the request must be a JSON object.")
    return body


async def _healthz(_: Request) -> Response:
    return PlainTextResponse("ok")


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = {
        404: f"Unknown request URL: {request.method} {request.url.path}.",
        405: f"Not allowed to {request.method} on {request.url.path}.",
    }.get(status, str(error))
    return OpenAIError(
        status, message, code={404: "unknown_url", 405: "method_not_supported"}.get(status)
    ).response()


async def _unexpected(_: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return OpenAIError(
        500, f"The server failed ({type(error).__name__}); see its log.", code="internal_error"
    ).response()
