"""The API server against controllers and workers that misbehave, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.ports import free_port
from tests.support.serving import serve_job
from yuan2_server import upstream as upstream_module
from yuan2_server.auth import KeyDirectory
from yuan2_server.lifecycle import HttpServer
from yuan2_server.openai_api import ApiServer
from yuan2_server.openai_errors import OpenAIError
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
        upstream = Upstream(cluster.url, "yuan2")
        exit_stack.push_async_callback(upstream.close)
        yield cluster, upstream


PARAMS = {"model": "yuan2", "prompt": "x", "max_new_tokens": 5}


async def texts(upstream: Upstream, **change: Any) -> list[str]:
    return [document["text"] async for document in upstream.generate({**PARAMS, **change}) if document]


async def test_documents_are_read_whatever_the_packets():
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE)
        assert await texts(upstream) == HELLO


async def test_an_unreachable_worker_is_left_for_others_and_costs_the_controller_nothing():
    async with cluster_and_upstream() as (cluster, upstream):
        cluster.dead_worker()
        await cluster.worker(FINE)
        for _ in range(3):
            assert await texts(upstream) == HELLO
        # Under shortest_queue the dead one is named first, then both in turns; nobody is asked to refresh.
        assert set(cluster.asked) == {"/get_worker_address"}


async def test_a_worker_that_is_lost_before_its_first_token_is_replaced_by_another_one():
    """Also when it had said that the request waits: an empty answer is no answer yet."""
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(streaming(document(""), document("")))
        await cluster.worker(FINE)
        assert await texts(upstream) == HELLO
        assert [request["prompt"] for request in cluster.requests] == ["x", "x"]


async def test_the_only_worker_is_asked_again_when_a_connection_breaks():
    """A peer that closes an idle connection just when the next request goes out on it."""
    async with cluster_and_upstream() as (cluster, upstream):
        worker = OneRequestAConnection(document("Hello", "stop"))
        cluster.workers = [await worker.start()]
        for _ in range(3):
            assert await texts(upstream) == ["Hello"]
        await worker.stop()
        worker = OneRequestAConnection(b'{"embedding": [[1.0]], "token_num": 1}')
        cluster.workers = [await worker.start()]
        for _ in range(3):
            assert (await upstream.embed("yuan2", ["x"], "float"))["token_num"] == 1
        await worker.stop()


async def test_the_controller_is_asked_again_when_a_connection_breaks():
    controller = OneRequestAConnection(b'{"models": ["yuan2"]}')
    upstream = Upstream(await controller.start(), "yuan2")
    for _ in range(4):
        assert await upstream.models() == ["yuan2"]
    await upstream.close()
    await controller.stop()


async def test_a_controller_that_is_away_or_has_forgotten_its_workers_fails_no_request():
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE)
        assert await texts(upstream) == HELLO
        assert await upstream.models() == ["yuan2"]
        known, cluster.workers = cluster.workers, []
        assert await texts(upstream) == HELLO  # started again: nobody has registered yet
        cluster.workers = known
        await cluster.servers[0].stop()
        assert await texts(upstream) == HELLO
        assert await upstream.models() == ["yuan2"]
        await cluster.servers[1].stop()
        with pytest.raises(OpenAIError) as raised:
            await texts(upstream)
        assert raised.value.status == 503


async def test_embeddings_that_take_too_long_are_not_asked_of_the_next_worker(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(upstream_module, "EMBEDDING_SECONDS", 0.05)
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE)
        await cluster.worker(FINE)
        with pytest.raises(OpenAIError) as raised:
            await upstream.embed("yuan2", ["never"], "float")
        assert (raised.value.status, raised.value.code) == (504, "worker_timeout")
        assert len(cluster.requests) == 1


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (streaming(), 503),  # nothing at all
        (streaming(b"<html>\0"), 503),
        (streaming(b'{"text": 5}\0'), 503),
        (streaming(json.dumps({"text": "max_new_tokens: no", "error_code": 40302}).encode() + b"\0"), 400),
        (streaming(json.dumps({"text": "full", "error_code": 42901}).encode() + b"\0"), 429),
        (streaming(json.dumps({"text": "loading", "error_code": 42903}).encode() + b"\0"), 503),
        (streaming(json.dumps({"text": "broken", "error_code": 50001}).encode() + b"\0"), 500),
    ],
)
async def test_an_answer_that_is_none_is_an_error(answer: Answer, status: int):
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(answer)
        with pytest.raises(OpenAIError) as raised:
            await texts(upstream)
        assert raised.value.status == status


async def test_another_status_than_200_is_an_error_and_not_an_empty_success():
    async def answer(_: dict[str, Any]) -> Response:
        return Response(document("Hello", "stop"), status_code=500)

    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(answer)
        with pytest.raises(OpenAIError) as raised:
            await texts(upstream)
        assert raised.value.status == 503


@pytest.mark.parametrize(
    "end", [b"", b'{"text": "Hel', json.dumps({"text": "broken", "error_code": 50001}).encode() + b"\0"]
)
async def test_an_answer_that_breaks_off_ends_with_an_error_after_what_there_was(end: bytes):
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(streaming(document("He"), end))
        documents = upstream.generate(PARAMS)
        first = await anext(documents)
        assert first is not None
        assert first["text"] == "He"
        with pytest.raises(OpenAIError) as raised:
            await anext(documents)
        assert (raised.value.status, raised.value.code) == (500, "worker_failed")


async def test_models_that_are_not_served_and_models_without_a_worker():
    async with cluster_and_upstream() as (_, upstream):
        for model, status in (("yuan2", 503), ("other", 404)):
            with pytest.raises(OpenAIError) as raised:
                await texts(upstream, model=model)
            assert raised.value.status == status


async def test_fastchats_own_worker_gets_a_limit_that_fits():
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE, details={"context_length": 100})
        await texts(upstream, max_new_tokens=None)
        assert cluster.requests[-1]["max_new_tokens"] == 60


async def test_our_worker_limits_the_answer_itself():
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE)
        await texts(upstream, max_new_tokens=None)
        assert cluster.requests[-1]["max_new_tokens"] is None


@asynccontextmanager
async def api_server(tmp_path: Path) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    async with cluster_and_upstream() as (cluster, upstream), AsyncExitStack() as exit_stack:
        job = serve_job(tmp_path, cluster.url)
        port = free_port()
        server = HttpServer(ApiServer(job, upstream, KeyDirectory(tmp_path)).app(), port, "127.0.0.1")
        await server.start()
        exit_stack.push_async_callback(server.stop)
        yield (
            cluster,
            await exit_stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}")),
        )


CHAT = {"model": "yuan2", "messages": [{"role": "user", "content": "Hi"}]}


async def test_an_error_inside_a_stream_is_an_event(tmp_path: Path):
    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(streaming(document("He")))
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert json.loads(events[-2])["error"]["code"] == "worker_failed"
        assert events[-1] == "[DONE]"
        whole = await client.post("/v1/chat/completions", json=CHAT)
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "worker_failed")


async def test_a_client_that_leaves_ends_the_workers_stream(tmp_path: Path):
    started, ended = asyncio.Event(), asyncio.Event()

    async def endless(_: dict[str, Any]) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    started.set()
                    yield document("He")
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return StreamingResponse(body())

    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(endless)
        for stream in (True, False):
            started.clear()
            ended.clear()
            asking = asyncio.create_task(
                client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, timeout=60)
            )
            await asyncio.wait_for(started.wait(), 5)
            asking.cancel()
            await asyncio.wait_for(ended.wait(), 5)
        metrics = (await client.get("/metrics")).text
        assert 'yuan2_api_requests_total{route="/v1/chat/completions",status="200"} 1.0' in metrics
