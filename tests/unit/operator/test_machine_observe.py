"""References that are missing, Jobs that are looked for, progress that is read from a pod."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.support.api_server import Api, api
from tests.support.finetunes import progress_of
from tests.support.progress_server import ProgressServer
from yuan2_operator.client import Client, Forbidden
from yuan2_operator.observe import Observer
from yuan2_operator.plan.references import Missing, Reference

__all__ = ["api"]

CLAIM = Reference("PersistentVolumeClaim", "data", "spec.dataset.source")
TALK = Reference("ConfigMap", "talk", "spec.dataset.source", "a.json")
ADDRESS = "127.0.2.1"


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
    assert await observer.missing("demo", [TALK]) == []


async def test_what_may_not_be_looked_at_is_no_answer(api, http):
    server, client = api
    server.answer("GET", "/api/v1/namespaces/demo/configmaps/talk", {"message": "forbidden"}, 403)
    with pytest.raises(Forbidden):
        await observer_of(client, http).missing("demo", [TALK])


async def test_a_job_is_there_or_not(api, http):
    server, client = api
    server.answer("GET", "/apis/batch/v1/namespaces/demo/jobs/x-1", {"metadata": {"name": "x-1"}})
    observer = observer_of(client, http)
    assert (await observer.job("demo", "x-1")) == {"metadata": {"name": "x-1"}}
    assert await observer.job("demo", "x-2") is None


async def test_progress_is_read_from_the_pods_address(api, http):
    server, client = api
    observer = observer_of(client, http)
    assert await observer.progress("demo", "x-1-0", ADDRESS) is None
    with ProgressServer(ADDRESS).running() as trainer:
        assert await observer.progress("demo", "x-1-0", ADDRESS) is None
        trainer.progress = progress_of("x", step=7)
        seen = await observer.progress("demo", "x-1-0", ADDRESS)
    assert seen == progress_of("x", step=7)
    assert server.asked == []


async def test_progress_is_read_through_the_api_server_from_outside(api: tuple[Api, Client], http):
    server, client = api
    path = "/api/v1/namespaces/demo/pods/x-1-0:9390/proxy/progress"
    server.answer("GET", path, progress_of("x", step=7).model_dump(by_alias=True))
    seen = await observer_of(client, http, proxy=True).progress("demo", "x-1-0", "10.0.0.1")
    assert seen == progress_of("x", step=7)
    assert await observer_of(client, http, proxy=True).progress("demo", "x-1-0", "10.0.0.1") is None


async def test_an_answer_of_another_form_is_no_progress(api, http):
    server, client = api
    server.answer("GET", "/api/v1/namespaces/demo/pods/x-1-0:9390/proxy/progress", {"step": "many"})
    assert await observer_of(client, http, proxy=True).progress("demo", "x-1-0", None) is None
