"""The OpenAI-compatible API server in front of FastChat's controller."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yuan2_core.contract import ServeJob
from yuan2_server import metrics
from yuan2_server.answers import CLIENT_GONE, ClientGoneError, Stream, while_connected
from yuan2_server.auth import KeyDirectory, RequireKey
from yuan2_server.bodies import (
    MAX_BYTES,
    UPLOAD_SECONDS,
    BodyTooLargeError,
    SlowUploadError,
    parse_object,
    read_body,
)
from yuan2_server.completion import Style, open_completion
from yuan2_server.openai_errors import OpenAIError, invalid, model_not_found
from yuan2_server.openai_params import Sampling, check_choices
from yuan2_server.openai_styles import Chat, PlainText
from yuan2_server.openai_text import (
    parse_completion_request,
    parse_embeddings_request,
    parse_tokenize_request,
)
from yuan2_server.openai_tokens import texts_of
from yuan2_server.openai_types import parse_chat_request
from yuan2_server.requests import HEADER, Identified
from yuan2_server.upstream import Document, Upstream

log = logging.getLogger(__name__)

STARTED = int(time.time())
"""`created` of the models: FastChat's controller does not say since when it knows them."""


class ApiServer:
    """The routes. `stopping` makes /readyz fail while open requests end."""

    def __init__(self, job: ServeJob, upstream: Upstream, keys: KeyDirectory) -> None:
        self._job = job
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
            Route("/v1/completions", _answering(self._complete), methods=["POST"]),
            Route("/v1/embeddings", _answering(self._embeddings), methods=["POST"]),
            Route("/tokenize", _answering(self._tokenize), methods=["POST"]),
            Route("/healthz", _healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._show_metrics),
        ]
        app: ASGIApp = Starlette(
            routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected}
        )
        if self._keys is not None:
            app = RequireKey(app, self._keys)
        if self._job.api.cors_origins:
            # Outside of the keys: a browser asks whether it may send one before it does.
            app = CORSMiddleware(
                app,
                allow_origins=self._job.api.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[HEADER],
            )
        return Measured(Identified(app), self._metrics, frozenset(route.path for route in routes))

    async def _list_models(self, _: Request) -> Response:
        cards = [self._card(name) for name in await self._upstream.models()]
        return JSONResponse({"object": "list", "data": cards})

    async def _show_model(self, request: Request) -> Response:
        name, names = request.path_params["model"], await self._upstream.models()
        if name not in names:
            raise model_not_found(name, names)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> Document:
        root = self._job.served_name if name in self._job.aliases else name
        return model_card(name, root)

    async def _chat(self, request: Request) -> Response:
        chat = parse_chat_request(await _read_object(request))
        chat.dialogue()
        check_choices(chat.n, self._job.api.max_choices, "n")
        log.info("chat completion: model %s, user %r, %d messages", chat.model, chat.user, len(chat.messages))
        return await self._answer(request, chat, Chat(), logprobs=chat.logprobs)

    async def _complete(self, request: Request) -> Response:
        asked = parse_completion_request(await _read_object(request))
        check_choices(asked.n, self._job.api.max_choices, "n")
        check_choices(asked.count, self._job.api.max_choices, "prompt")
        log.info("completion: model %s, user %r, %d prompts", asked.model, asked.user, len(asked.prompt))
        wanted = asked.logprobs is not None
        return await self._answer(request, asked, PlainText(), logprobs=wanted, prompts=len(asked.prompt))

    async def _answer(
        self, request: Request, asked: Sampling, style: Style, *, logprobs: bool, prompts: int = 1
    ) -> Response:
        spent = self._metrics.spender(asked.model)
        opening = open_completion(self._upstream, asked, style, spent, prompts)
        completion = await while_connected(request, opening)
        if asked.stream:
            return Stream(completion.events(), "text/event-stream", completion.close)
        try:
            return JSONResponse(await while_connected(request, completion.whole(logprobs=logprobs)))
        finally:
            await completion.close()

    async def _embeddings(self, request: Request) -> Response:
        asked = parse_embeddings_request(await _read_object(request))
        log.info("embeddings: model %s, user %r, %d texts", asked.model, asked.user, len(asked.input))
        inputs = await texts_of(asked.model, asked.input)
        work = self._upstream.embed(asked.model, inputs, asked.encoding_format)
        answer = await while_connected(request, work)
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(answer["embedding"])
        ]
        self._metrics.spender(asked.model)(answer["token_num"], 0)
        usage = {"prompt_tokens": answer["token_num"], "total_tokens": answer["token_num"]}
        return JSONResponse({"object": "list", "model": asked.model, "data": data, "usage": usage})

    async def _tokenize(self, request: Request) -> Response:
        asked = parse_tokenize_request(await _read_object(request))
        answer = await while_connected(request, self._upstream.tokenize(asked.worker_body()))
        tokens = answer["tokens"]
        length = answer["context_length"]
        return JSONResponse({"count": len(tokens), "max_model_len": length, "tokens": tokens})

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


def model_card(name: str, root: str) -> Document:
    """A model as FastChat's API shows it."""
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": STARTED,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": True,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "fastchat",
        "root": root,
        "parent": None if name == root else root,
        "permission": [permission],
    }


async def _read_object(request: Request) -> dict[str, Any]:
    try:
        return parse_object(await read_body(request))
    except ValueError as error:
        raise invalid(None, f"We could not parse the JSON body of your request: {error}.") from None
    except BodyTooLargeError:
        message = f"The body of the request has more than {MAX_BYTES} bytes."
        raise OpenAIError(413, message, code="request_too_large") from None
    except SlowUploadError:
        message = f"The body of the request was not there after {UPLOAD_SECONDS:.0f} seconds."
        raise OpenAIError(408, message, code="request_timeout") from None


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
