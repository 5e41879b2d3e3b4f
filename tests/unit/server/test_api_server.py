"""The API server and clients that do what they should not, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response, StreamingResponse

from tests.support.scripted_cluster import FINE, api_server, document, streaming
from yuan2_server import answers, bodies

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


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[" * 100_000, 400, None),
        (b'{"model": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", 400, None),
        (json.dumps({**CHAT, "model": "\ud800"}).encode(), 400, None),
        (json.dumps({**CHAT, "user": "\udfff"}).encode(), 400, None),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, None),
        (b"\xff\xfe", 400, None),
        (b'"' + b"x" * (16 * 2**20) + b'"', 413, "request_too_large"),
        (json.dumps({**CHAT, "stop": ["x"] * 100_000}).encode(), 400, None),
        (json.dumps({**CHAT, "n": 65}).encode(), 400, None),
    ],
)
async def test_whatever_a_body_holds_it_is_no_server_error(
    tmp_path: Path, body: bytes, status: int, code: str | None
):
    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(FINE)
        answer = await client.post("/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def raw_client(
    client: httpx.AsyncClient, head: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=2**16)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + head)
    await writer.drain()
    return reader, writer


async def test_a_slow_upload_ends_and_a_broken_one_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(bodies, "UPLOAD_SECONDS", 0.05)
    async with api_server(tmp_path) as (_, client):
        reader, writer = await raw_client(client, b'content-length: 100\r\n\r\n{"model"')
        assert b" 408 " in await reader.readline()
        writer.close()
        monkeypatch.setattr(bodies, "UPLOAD_SECONDS", 60)
        _, writer = await raw_client(client, b'content-length: 100\r\n\r\n{"model"')
        writer.close()
        await writer.wait_closed()
        while 'status="499"' not in (await client.get("/metrics")).text:  # noqa: ASYNC110 -- it is another's
            await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_stops_reading_is_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "STALLED_SECONDS", 0.3)
    ended = asyncio.Event()

    async def endless(_: dict[str, Any]) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield document("x" * 2**18, delta=True)
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(body())

    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(endless)
        body = json.dumps({**CHAT, "stream": True}).encode()
        _, writer = await raw_client(client, b"content-length: %d\r\n\r\n" % len(body) + body)
        await asyncio.wait_for(ended.wait(), 30)
        writer.close()


async def test_a_request_has_one_id_everywhere(tmp_path: Path):
    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(FINE)
        named = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc-1"})
        assert named.headers["x-request-id"] == cluster.request_ids[-1] == "abc-1"
        for given in ({}, {"x-request-id": "a b\tc"}):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=given)
            assert answer.headers["x-request-id"] == cluster.request_ids[-1]
            assert len(answer.headers["x-request-id"]) == 32
        assert (await client.get("/nothing")).headers["x-request-id"]


async def test_a_web_page_may_ask_where_the_service_says_so(tmp_path: Path):
    (tmp_path / "team-a").write_text("sk-1")
    page = "https://app.example"
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with api_server(tmp_path, cors_origins=(page,), require_key=True) as (cluster, client):
        await cluster.worker(FINE)
        asked = await client.options("/v1/chat/completions", headers={"origin": page, **wish})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, page)
        refused = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
    async with api_server(tmp_path) as (_, client):
        answer = await client.get("/v1/models", headers={"origin": page})
        assert "access-control-allow-origin" not in answer.headers


async def test_tokens_are_counted_for_the_name_of_the_key(tmp_path: Path):
    (tmp_path / "team-a").write_text("sk-1")
    key = {"authorization": "Bearer sk-1"}
    async with api_server(tmp_path, require_key=True) as (cluster, client):
        await cluster.worker(FINE)
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=key)
            assert answer.is_success
        shown = (await client.get("/metrics")).text
        assert 'yuan2_api_tokens_total{key="team-a",kind="prompt",model="yuan2"} 6.0' in shown
        assert 'yuan2_api_tokens_total{key="team-a",kind="completion",model="yuan2"} 10.0' in shown


async def test_a_stream_that_waits_for_a_worker_gets_comments(tmp_path: Path):
    async with api_server(tmp_path) as (cluster, client):
        await cluster.worker(streaming(document(""), document(""), document("Hi", "stop")))
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert answer.text.count(": waiting for a worker\n\n") == 2
