"""A controller with scripted workers, over real sockets, and the API server in front of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.ports import free_port
from tests.support.serving import serve_job
from yuan2_server.auth import KeyDirectory
from yuan2_server.lifecycle import HttpServer
from yuan2_server.openai_api import ApiServer
from yuan2_server.upstream import Upstream

Answer = Callable[[dict[str, Any]], Awaitable[Response]]


def document(text: str, finish: str | None = None, **more: Any) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
    body = {"text": text, "error_code": 0, "usage": usage, "finish_reason": finish, **more}
    return json.dumps(body).encode() + b"\0"


def streaming(*parts: bytes) -> Answer:
    """A worker that sends these parts and closes."""

    async def answer(_: dict[str, Any]) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for part in parts:
                yield part
                await asyncio.sleep(0.001)

        return StreamingResponse(body())

    return answer


HELLO = ["He", "Hello", "Hello"]
FINE = streaming(document("He"), document("Hello")[:9], document("Hello")[9:], document("Hello", "stop"))


class Cluster:
    """A controller with scripted workers; a worker is an address, or an answer served at one."""

    def __init__(self, exit_stack: AsyncExitStack) -> None:
        self._exit = exit_stack
        self.workers: list[str] = []
        self.queues: dict[str, int] = {}
        self.asked: list[str] = []
        self.servers: list[HttpServer] = []
        self.requests: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self.url = ""

    async def start(self) -> None:
        async def address(request: Request) -> Response:
            """FastChat's shortest_queue."""
            self.asked.append(request.url.path)
            if not self.workers:
                return JSONResponse({"address": ""})
            shortest = min(self.workers, key=lambda worker: self.queues.get(worker, 0))
            self.queues[shortest] = self.queues.get(shortest, 0) + 1
            return JSONResponse({"address": shortest})

        async def models(request: Request) -> Response:
            self.asked.append(request.url.path)
            return JSONResponse({"models": ["yuan2"] if self.workers else []})

        self.url = await self._serve([("/get_worker_address", address), ("/list_models", models)])

    async def worker(self, answer: Answer, details: dict[str, Any] | None = None) -> None:
        async def generate(request: Request) -> Response:
            self.requests.append(await request.json())
            self.request_ids.append(request.headers.get("x-request-id", ""))
            return await answer(self.requests[-1])

        async def show_details(_: Request) -> Response:
            return JSONResponse(details or {"context_length": 100, "messages": True})

        async def count(_: Request) -> Response:
            return JSONResponse({"count": 40, "error_code": 0})

        async def embed(request: Request) -> Response:
            self.requests.append(await request.json())
            if self.requests[-1]["input"] == ["never"]:
                await asyncio.sleep(0.5)
            return JSONResponse({"embedding": [[1.0]], "token_num": 1})

        routes = [
            ("/worker_generate_stream", generate),
            ("/model_details", show_details),
            ("/count_token", count),
            ("/worker_get_embeddings", embed),
        ]
        self.workers.append(await self._serve(routes))

    def dead_worker(self) -> None:
        self.workers.append(f"http://127.0.0.1:{free_port()}")

    async def _serve(self, routes: list[tuple[str, Callable[[Request], Awaitable[Response]]]]) -> str:
        port = free_port()
        app = Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in routes])
        server = HttpServer(app, port, "127.0.0.1")
        await server.start()
        self.servers.append(server)
        self._exit.push_async_callback(server.stop)
        return f"http://127.0.0.1:{port}"


class OneRequestAConnection:
    """Answers the first request of each connection and breaks it at the second, as a server does that closes
    an idle connection while a request is on its way."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client closed the connection first
            await self._read(reader)
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(self._body) + self._body)
            await writer.drain()
            await self._read(reader)
        writer.close()
        await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)


@asynccontextmanager
async def cluster_and_upstream() -> AsyncIterator[tuple[Cluster, Upstream]]:
    async with AsyncExitStack() as exit_stack:
        cluster = Cluster(exit_stack)
        await cluster.start()
        upstream = Upstream(cluster.url, ("yuan2", "gpt-3.5-turbo"))
        exit_stack.push_async_callback(upstream.close)
        yield cluster, upstream


@asynccontextmanager
async def api_server(tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with cluster_and_upstream() as (cluster, upstream), AsyncExitStack() as exit_stack:
        job = serve_job(tmp_path, cluster.url, **changes)
        port = free_port()
        server = HttpServer(ApiServer(job, upstream, KeyDirectory(tmp_path)).app(), port, "127.0.0.1")
        await server.start()
        exit_stack.push_async_callback(server.stop)
        yield (
            cluster,
            await exit_stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}")),
        )
