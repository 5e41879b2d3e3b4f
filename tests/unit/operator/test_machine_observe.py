"""References that are missing, Jobs that are looked for, progress that is read from a pod."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from decimal import Decimal

import aiohttp
import pytest
from pydantic import ValidationError

from tests.support.api_server import Api, api
from tests.support.finetunes import progress_of
from tests.support.progress_server import ProgressServer
from yuan2_core.contract import PORT_PROGRESS, Progress
from yuan2_operator.client import Client, Forbidden
from yuan2_operator.observe import Observer, Silent
from yuan2_operator.plan.capacity import Demand
from yuan2_operator.plan.references import Missing, Reference

__all__ = ["api"]

CLAIM = Reference("PersistentVolumeClaim", "data", "spec.dataset.source")
TALK = Reference("ConfigMap", "talk", "spec.dataset.source", "a.json")
ADDRESS = "127.0.2.1"
PROXY = "/api/v1/namespaces/demo/pods/x-1-0:9390/proxy/progress"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def observer_of(client: Client, http: aiohttp.ClientSession, *, proxy: bool = False) -> Observer:
    return Observer(client, http, through_proxy=proxy)


async def test_what_is_missing_is_found_and_each_object_is_asked_for_once(api, http):
    server, client = api
    same = Reference("PersistentVolumeClaim", "data", "spec.output")
    found = await observer_of(client, http).missing("demo", [CLAIM, same, TALK])
    assert found == [Missing(CLAIM), Missing(same), Missing(TALK)]
    assert len(server.asked) == 2


async def test_a_config_map_without_the_key_is_missing_the_key(api, http):
    server, client = api
    path = "/api/v1/namespaces/demo/configmaps/talk"
    for data in ({"data": {"b": ""}}, {"binaryData": {"a.json": ""}}, {"data": {"a.json": "[]"}}):
        server.answer("GET", path, data)
    observer = observer_of(client, http)
    assert await observer.missing("demo", [TALK]) == [Missing(TALK, key_only=True)]
    assert await observer.missing("demo", [TALK]) == []
    observer.seen.clear()
    assert await observer.missing("demo", [TALK]) == []


async def test_what_was_there_is_not_looked_for_again_at_once(api, http, monkeypatch):
    server, client = api
    for _ in range(2):
        server.answer("GET", "/api/v1/namespaces/demo/configmaps/talk", {"data": {"a.json": "[]"}})
    observer = observer_of(client, http)
    assert [await observer.missing("demo", [TALK]) for _ in range(3)] == [[], [], []]
    assert len(server.asked) == 1
    monkeypatch.setattr("yuan2_operator.observe.KNOWN_SECONDS", -1.0)
    assert await observer.missing("demo", [TALK]) == []
    assert len(server.asked) == 2
    other = Reference("ConfigMap", "talk", "spec.dataset.source", "b.json")
    assert await observer.missing("demo", [other]) == [Missing(other)]


async def test_what_may_not_be_looked_at_is_no_answer(api, http):
    server, client = api
    server.answer("GET", "/api/v1/namespaces/demo/configmaps/talk", {"message": "forbidden"}, 403)
    with pytest.raises(Forbidden):
        await observer_of(client, http).missing("demo", [TALK])


async def test_nodes_and_pods_are_counted_once_for_all_that_wait(api, http):
    server, client = api
    gpu = {"nvidia.com/gpu": "8"}
    found = {"metadata": {"name": "a"}, "status": {"allocatable": gpu}}
    server.answer("GET", "/api/v1/nodes", {"items": [found]})
    held = {"spec": {"nodeName": "a", "containers": [{"resources": {"limits": {"nvidia.com/gpu": "2"}}}]}}
    server.answer("GET", "/api/v1/pods", {"items": [held]})
    observer = observer_of(client, http)
    wanted = Demand(2, "nvidia.com/gpu", Decimal(8), {})
    text = "none of 1 node has 8 nvidia.com/gpu free, 2 are needed; the next has 6"
    assert [await observer.room(wanted), await observer.room(wanted)] == [text, text]
    assert [entry[1] for entry in server.asked] == ["/api/v1/nodes", "/api/v1/pods"]
    assert server.asked[1][2]["fieldSelector"] == (
        "status.phase!=Succeeded,status.phase!=Failed,spec.nodeName!="
    )


async def test_an_operator_that_may_not_look_at_nodes_says_nothing_about_them(api, http):
    _, client = api
    assert await observer_of(client, http).room(Demand(2, "nvidia.com/gpu", Decimal(8), {})) is None


async def test_a_job_is_there_or_not(api, http):
    server, client = api
    server.answer("GET", "/apis/batch/v1/namespaces/demo/jobs/x-1", {"metadata": {"name": "x-1"}})
    observer = observer_of(client, http)
    assert (await observer.job("demo", "x-1")) == {"metadata": {"name": "x-1"}}
    assert await observer.job("demo", "x-2") is None


async def test_progress_is_read_from_the_pods_address(api, http):
    server, client = api
    observer = observer_of(client, http)
    with ProgressServer(ADDRESS).running() as trainer:
        trainer.progress = progress_of("x", step=7)
        seen = await observer.progress("demo", "x-1-0", ADDRESS)
    assert seen == progress_of("x", step=7)
    assert server.asked == []


async def test_progress_is_read_through_the_api_server_from_outside(api: tuple[Api, Client], http):
    server, client = api
    server.answer("GET", PROXY, progress_of("x", step=7).model_dump(by_alias=True))
    seen = await observer_of(client, http, proxy=True).progress("demo", "x-1-0", "10.0.0.1")
    assert seen == progress_of("x", step=7)


async def test_fields_of_a_newer_trainer_are_ignored(api, http):
    server, client = api
    newer = {**progress_of("x", step=7).model_dump(by_alias=True), "warpFactor": 9}
    server.answer("GET", PROXY, newer)
    seen = await observer_of(client, http, proxy=True).progress("demo", "x-1-0", None)
    assert seen == progress_of("x", step=7)
    with pytest.raises(ValidationError):
        Progress.model_validate(newer)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            403,
            {"message": "pods is forbidden"},
            "the API server does not let the operator ask pod x-1-0 (pods is forbidden): grant `get` on "
            "pods/proxy",
        ),
        (
            200,
            {"name": "x", "attempt": 1, "state": "dreaming"},
            "the answer of pod x-1-0 cannot be read (state: Input should be",
        ),
        (
            404,
            {"message": "not found"},
            "pod x-1-0 does not answer through the API server: a NetworkPolicy or a firewall may be",
        ),
        (200, {"name": "x" * 70_000}, "the answer of pod x-1-0 is longer than 65536 bytes"),
    ],
)
async def test_why_a_pod_says_nothing_through_the_api_server(api, http, status, body, words):
    server, client = api
    server.answer("GET", PROXY, body, status)
    with pytest.raises(Silent) as caught:
        await observer_of(client, http, proxy=True).progress("demo", "x-1-0", None)
    assert str(caught.value).startswith(words)


async def test_a_pod_that_does_not_listen_is_silent(api, http):
    _, client = api
    with pytest.raises(Silent) as caught:
        await observer_of(client, http).progress("demo", "x-1-0", ADDRESS)
    text = "pod x-1-0 does not answer on port 9390: a NetworkPolicy or a firewall may be in the way"
    assert str(caught.value) == text


@contextlib.asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[None]:
    """A pod that sends bytes one after the other to the first who asks."""
    over = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        over.set()

    async with await asyncio.start_server(talk, ADDRESS, PORT_PROGRESS):
        yield
        await over.wait()


async def test_a_pod_cannot_send_the_operator_elsewhere(api, http):
    server, client = api
    elsewhere = (
        f"HTTP/1.1 302 Found\r\nLocation: {client._credentials.server}/secret\r\nContent-Length: 0\r\n\r\n"
    )
    async with answering(elsewhere.encode()):
        with pytest.raises(Silent) as caught:
            await observer_of(client, http).progress("demo", "x-1-0", ADDRESS)
    assert str(caught.value) == "pod x-1-0 answers on port 9390 with HTTP status 302"
    assert server.asked == []


async def test_the_api_servers_proxy_is_not_followed_elsewhere_either(api, http):
    server, client = api
    server.redirect(PROXY, "/api/v1/namespaces/demo/secrets/key")
    with pytest.raises(Silent):
        await observer_of(client, http, proxy=True).progress("demo", "x-1-0", None)
    assert [entry[1] for entry in server.asked] == [PROXY]


async def test_an_answer_that_comes_in_pieces_is_read_whole(api, http):
    _, client = api
    body = progress_of("x", step=7).to_json().encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with answering(head, body[:20], body[20:90], body[90:]):
        seen = await observer_of(client, http).progress("demo", "x-1-0", ADDRESS)
    assert seen == progress_of("x", step=7)


async def test_no_more_than_the_limit_is_read_of_an_endless_answer(api, http):
    _, client = api
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
    async with answering(head, *[b" " * 20_000] * 4):
        with pytest.raises(Silent) as caught:
            await observer_of(client, http).progress("demo", "x-1-0", ADDRESS)
    assert str(caught.value) == "the answer of pod x-1-0 is longer than 65536 bytes"
