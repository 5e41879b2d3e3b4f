"""The API client against a server of its own: paths, bodies, errors in one place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.api_server import Login, api
from yuan2_operator.apply import Applier, Occupied, difference, key_of
from yuan2_operator.cache import Cache
from yuan2_operator.client import (
    CONFIG_MAPS,
    FINETUNES,
    JOBS,
    PODS,
    Client,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Unavailable,
    error_of,
)
from yuan2_operator.constants import KIND_FINETUNE
from yuan2_operator.plan.owner import Owner

__all__ = ["api"]

OWNER = Owner(KIND_FINETUNE, "alpaca", "demo", "uid-1", 1)
OURS = [{"uid": "uid-1", "controller": True}]


def test_paths_are_those_of_the_api():
    assert PODS.path("demo", "x", "status") == "/api/v1/namespaces/demo/pods/x/status"
    assert JOBS.path(None) == "/apis/batch/v1/jobs"
    assert FINETUNES.path("demo") == "/apis/yuan2.dev/v1alpha1/namespaces/demo/yuan2finetunes"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFound),
        (409, Conflict),
        (401, Forbidden),
        (403, Forbidden),
        (422, Invalid),
        (429, Unavailable),
        (503, Unavailable),
    ],
)
def test_errors_are_told_apart_by_their_status(status, kind):
    error = error_of(status, b'{"kind":"Status","message":"the reason"}', {"Retry-After": "3"})
    assert type(error) is kind
    assert (str(error), error.retry_after) == ("the reason", 3.0)


def test_an_answer_that_is_no_status_is_told_as_it_is():
    assert str(error_of(502, b"<html>bad gateway", {})) == "<html>bad gateway"
    assert str(error_of(500, b"", {})) == "HTTP status 500"


async def test_a_list_is_read_page_by_page(api):
    server, client = api
    path = "/apis/batch/v1/jobs"
    server.answer("GET", path, {"items": [{"n": 1}], "metadata": {"continue": "more"}})
    server.answer("GET", path, {"items": [{"n": 2}], "metadata": {}})
    assert await client.list_all(JOBS, None, "a=b") == [{"n": 1}, {"n": 2}]
    queries = [entry[2] for entry in server.asked]
    assert queries[0] == {"limit": "500", "labelSelector": "a=b"}
    assert queries[1]["continue"] == "more"


async def test_a_status_is_patched_by_merge(api):
    server, client = api
    path = "/apis/yuan2.dev/v1alpha1/namespaces/demo/yuan2finetunes/alpaca/status"
    server.answer("PATCH", path, {"metadata": {"name": "alpaca"}})
    await client.patch_status(FINETUNES, "demo", "alpaca", {"step": 3})
    _, _, query, body, content_type = server.asked[0]
    assert (body, content_type) == ({"status": {"step": 3}}, "application/merge-patch+json")
    assert query["fieldManager"] == "yuan2-operator"


async def test_what_is_gone_already_is_deleted(api):
    _, client = api
    await client.delete(JOBS, "demo", "none")


async def test_no_answer_is_worth_another_try():
    client = Client(lambda: Login("http://127.0.0.1:1"))
    with pytest.raises(Unavailable):
        await client.get(PODS, "demo", "x")
    await client.close()


def config_map(**more: Any) -> dict[str, Any]:
    metadata = {"name": "c", "namespace": "demo", "ownerReferences": OURS}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"a": "b"}, **more}


def stored(version: int = 1, **more: Any) -> dict[str, Any]:
    made = config_map(**more)
    made["metadata"] = {**made["metadata"], "uid": "c1", "resourceVersion": str(version)}
    return made


CONFIG = "/api/v1/namespaces/demo/configmaps"


def applier_of(client: Client, *live: dict[str, Any]) -> Applier:
    return Applier(client, Cache({"configmaps": {key_of(OWNER): list(live)}}))


async def test_a_new_child_is_applied_from_the_beginning(api):
    server, client = api
    server.answer("PATCH", f"{CONFIG}/c", stored())
    applier = applier_of(client)
    await applier.ensure(OWNER, [config_map()])
    assert [entry[0] for entry in server.asked] == ["GET", "PATCH"]
    await applier.ensure(OWNER, [config_map()])
    assert len(server.asked) == 2, "what is as it should be costs no request"


async def test_a_child_that_never_changes_is_created(api):
    server, client = api
    server.answer("POST", CONFIG, stored(immutable=True), 201)
    await applier_of(client).ensure(OWNER, [config_map(immutable=True)])
    assert [entry[0] for entry in server.asked] == ["POST"]


async def test_a_child_that_was_created_by_a_lost_pass_is_taken(api):
    server, client = api
    server.answer("POST", CONFIG, {"message": "exists"}, 409)
    server.answer("GET", f"{CONFIG}/c", stored(immutable=True))
    await applier_of(client).ensure(OWNER, [config_map(immutable=True)])


async def test_a_child_that_differs_is_applied_again(api):
    server, client = api
    server.answer("PATCH", f"{CONFIG}/c", stored(2))
    await applier_of(client, stored(data={"a": "changed"})).ensure(OWNER, [config_map()])
    assert server.asked[0][2]["force"] == "true"


async def test_somebody_elses_object_is_left_alone(api):
    server, client = api
    foreign = stored()
    foreign["metadata"]["ownerReferences"] = []
    server.answer("GET", f"{CONFIG}/c", foreign)
    with pytest.raises(Occupied, match="ConfigMap c exists and does not belong to Yuan2FineTune alpaca"):
        await applier_of(client).ensure(OWNER, [config_map()])
    assert [entry[0] for entry in server.asked] == ["GET"]


async def test_children_of_an_earlier_resource_of_the_name_are_waited_for(api):
    _, client = api
    old = stored()
    old["metadata"] |= {"ownerReferences": [{"uid": "uid-0"}], "labels": {"yuan2.dev/finetune": "alpaca"}}
    with pytest.raises(Occupied, match="of an earlier Yuan2FineTune alpaca is still being removed"):
        await applier_of(client, old).ensure(OWNER, [config_map()])


async def test_a_child_is_deleted_once(api):
    server, client = api
    server.answer("DELETE", f"{CONFIG}/c", {})
    applier = applier_of(client, stored())
    for _ in range(2):
        await applier.remove(OWNER, "ConfigMap", "c", "2026-01-01T00:00:00Z", wait=True)
    assert len(server.asked) == 1
    assert server.asked[0][3]["propagationPolicy"] == "Foreground"
    assert CONFIG_MAPS.plural == "configmaps"


@pytest.mark.parametrize(
    ("wanted", "live", "text"),
    [
        ({"a": 1}, {"a": 1, "default": 2}, None),
        ({"cpu": "1000m"}, {"cpu": "1"}, None),
        ({"memory": "1024Mi"}, {"memory": "1Gi"}, None),
        ({"a": {}}, {}, None),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}]}, None),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1, 2], not [1]"),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, "a.b: 'y', not 'x'"),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, "a[0].b: 2, not 1"),
        ({"a": 1}, {}, "a: None, not 1"),
    ],
)
def test_a_difference_is_what_is_wanted_and_not_there(wanted, live, text):
    assert difference(wanted, live) == text
