"""The worker's HTTP routes: read the body, call `ModelWorker`, write the answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from yuan2_server import metrics
from yuan2_server.answers import CLIENT_GONE, ClientGoneError, Stream, while_connected
from yuan2_server.bodies import MAX_BYTES, BodyTooLargeError, SlowUploadError, parse_object, read_body
from yuan2_server.engines.seam import as_request_error
from yuan2_server.protocol import (
    ErrorCode,
    RequestError,
    encode_document,
    error_document,
)
from yuan2_server.requests import Identified
from yuan2_server.stream import cumulated
from yuan2_server.worker import Generation, ModelWorker

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
Call = Callable[[ModelWorker, dict[str, Any]], Awaitable[dict[str, Any]]]


class WorkerHost:
    """The place of the worker while its model is being loaded, and whether the controller knows it."""

    def __init__(self, served_name: str) -> None:
        self.served_name = served_name
        self.metrics = metrics.WorkerMetrics()
        self.worker: ModelWorker | None = None
        self.is_registered: Callable[[], bool] = lambda: False

    def ready(self) -> str:
        """Why requests do not arrive here; empty when they do."""
        if self.worker is None:
            return "the model is being loaded"
        if self.broken():
            return self.broken()
        if self.worker.draining:
            return "the worker is shutting down"
        return "" if self.is_registered() else "the controller does not know this worker"

    def broken(self) -> str:
        """Why only another process can help; empty while all is well."""
        return "" if self.worker is None else self.worker.model.engine.problem

    def serving(self) -> ModelWorker:
        """The worker. Raises RequestError while the model is being loaded."""
        if self.worker is None:
            raise RequestError(ErrorCode.ENGINE_OVERLOADED, "the model is being loaded; try again later")
        return self.worker


def build_app(host: WorkerHost) -> ASGIApp:
    """The worker's routes: FastChat's protocol, probes and metrics."""

    async def status(_: Request) -> Response:
        empty = {"model_names": [], "speed": 1, "queue_length": 0}
        return JSONResponse(host.worker.status() if host.worker else empty)

    async def healthz(_: Request) -> Response:
        problem = host.broken()
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    async def readyz(_: Request) -> Response:
        problem = host.ready()
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    async def show_metrics(_: Request) -> Response:
        return metrics.render(host.metrics.registry)

    app = Starlette(
        routes=[
            Route("/worker_get_status", status, methods=["POST"]),
            Route("/worker_get_conv_template", _json(host, _conv_template), methods=["POST"]),
            Route("/model_details", _json(host, _model_details), methods=["POST"]),
            Route("/count_token", _json(host, ModelWorker.count_token), methods=["POST"]),
            Route("/tokenize", _json(host, ModelWorker.tokenize), methods=["POST"]),
            Route("/worker_get_embeddings", _json(host, ModelWorker.embeddings), methods=["POST"]),
            Route("/worker_generate", _json(host, _generate), methods=["POST"]),
            Route("/worker_generate_stream", _generate_stream(host), methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ]
    )
    return Identified(app)


async def _conv_template(worker: ModelWorker, _: dict[str, Any]) -> dict[str, Any]:
    return worker.conv_template()


async def _model_details(worker: ModelWorker, _: dict[str, Any]) -> dict[str, Any]:
    # FastChat reads context_length; `messages` tells our API server that this worker renders conversations
    # itself.
    return {"context_length": worker.model.context_length, "messages": True}


async def _generate(worker: ModelWorker, body: dict[str, Any]) -> dict[str, Any]:
    async with aclosing(await worker.generate(body)) as generation:
        final = [chunk async for chunk in cumulated(generation)][-1]
    return final.to_dict()


def _json(host: WorkerHost, call: Call) -> Handler:
    """A route that answers one JSON document. As in FastChat, an error is HTTP 200 with an `error_code`."""

    async def route(request: Request) -> Response:
        try:
            body = await read_object(request)
            return JSONResponse(await while_connected(request, call(host.serving(), body)))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001 -- told to the client by kind, to the log in full
            return JSONResponse(error_document(_told(error)))

    return route


def _generate_stream(host: WorkerHost) -> Handler:
    async def route(request: Request) -> Response:
        try:
            body = await read_object(request)
            generation = await while_connected(request, host.serving().generate(body))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001 -- told to the client by kind, to the log in full
            return Response(encode_document(error_document(_told(error))), media_type="application/json")
        documents = _documents(generation, delta=body.get("deltas") is True)
        return Stream(documents, "application/json", generation.aclose)

    return route


async def _documents(generation: Generation, *, delta: bool) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in generation if delta else cumulated(generation):
            yield encode_document(chunk.to_dict(delta=delta))
    except RequestError as error:
        yield encode_document(error_document(error))


async def read_object(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises RequestError when it is not one, ClientGoneError when the client
    leaves."""
    try:
        return parse_object(await read_body(request) or b"{}")
    except ValueError as error:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, f"body: {error}") from None
    except BodyTooLargeError:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, f"body: more than {MAX_BYTES} bytes") from None
    except SlowUploadError:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "body: sent too slowly") from None


def _told(error: Exception) -> RequestError:
    if not isinstance(error, RequestError):
        log.error("request failed", exc_info=error)
    return as_request_error(error)
