"""What the API server does when controllers and workers misbehave, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import Response

from tests.support.scripted_cluster import (
    FINE,
    HELLO,
    Answer,
    OneRequestAConnection,
    cluster_and_upstream,
    document,
    streaming,
)
from yuan2_server import upstream as upstream_module
from yuan2_server.openai_errors import OpenAIError
from yuan2_server.upstream import Upstream

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
    upstream = Upstream(await controller.start(), ("yuan2",))
    for _ in range(4):
        assert await upstream.models() == ["yuan2"]
    await upstream.close()
    await controller.stop()


async def test_a_controller_that_is_away_or_has_forgotten_its_workers_fails_no_request():
    async with cluster_and_upstream() as (cluster, upstream):
        await cluster.worker(FINE)
        assert await texts(upstream) == HELLO
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
        for model, status in (("yuan2", 503), ("gpt-3.5-turbo", 503), ("other", 404)):
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
