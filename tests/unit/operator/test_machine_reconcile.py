"""Whole passes against an API server that answers what a test has prepared."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from tests.support.api_server import Api, api
from tests.support.attempts import START, spec_of
from tests.support.finetunes import MINIMAL, finetune_object, merged
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.apply import Applier
from yuan2_operator.cache import Cache
from yuan2_operator.client import FINETUNES, YUAN_SERVICES, Client
from yuan2_operator.config import Settings
from yuan2_operator.handlers.watched import WATCHED
from yuan2_operator.observe import Observer
from yuan2_operator.queue import Key
from yuan2_operator.reconcile import Reconciler
from yuan2_operator.reconcile.context import Context
from yuan2_operator.reconcile.polling import Poller
from yuan2_operator.reconcile.refusal import Reading, parse_spec

__all__ = ["api"]

TUNE, SERVE = Key("Yuan2FineTune", "demo", "alpaca"), Key("Yuan2Service", "demo", "alpaca")
EVENTS = "/apis/events.k8s.io/v1/namespaces/demo/events"


def identified(resource: dict[str, Any]) -> dict[str, Any]:
    resource["metadata"] |= {"uid": "uid-1", "generation": 2, "resourceVersion": "1"}
    return resource


def service_object(**spec: Any) -> dict[str, Any]:
    body = {"model": {"name": "yuan2", "fineTuneRef": {"name": "tuned"}}, **spec}
    metadata = {"name": "alpaca", "namespace": "demo"}
    return {"apiVersion": "yuan2.dev/v1alpha1", "kind": "Yuan2Service", "metadata": metadata, "spec": body}


class Passes:
    """A reconciler whose watches show one resource."""

    def __init__(
        self, client: Client, http: aiohttp.ClientSession, key: Key, resource: dict[str, Any]
    ) -> None:
        plural = FINETUNES.plural if key.kind == "Yuan2FineTune" else YUAN_SERVICES.plural
        indices: dict[str, dict[Key, list[dict[str, Any]]]] = {watched.plural: {} for watched in WATCHED}
        indices[plural][key] = [identified(resource)]
        cache = Cache(indices)
        observer = Observer(client, http, through_proxy=False)
        self.key, self.resource = key, resource
        self.reconcile = Reconciler(
            Context(
                settings=Settings(train_image="t:1", serve_image="s:1"),
                client=client,
                cache=cache,
                applier=Applier(client, cache),
                observer=observer,
                poller=Poller(observer.progress, lambda key: None, 5.0, lambda: START),
                instance="test",
                clock=lambda: START,
            )
        )


def answer_status(server: Api, plural: str, resource: dict[str, Any], status: dict[str, Any]) -> None:
    """The API server takes the status and says how the object then is."""
    path = f"/apis/yuan2.dev/v1alpha1/namespaces/demo/{plural}/alpaca/status"
    metadata = {**resource["metadata"], "resourceVersion": "2"}
    server.answer("PATCH", path, {**resource, "metadata": metadata, "status": status})
    server.answer("POST", EVENTS, {}, 201)


@pytest.mark.parametrize(
    ("key", "resource", "words"),
    [
        (TUNE, finetune_object("alpaca", "demo", model={"size": "3B"}), "spec.model.size: "),
        (SERVE, service_object(worker={"precision": "int1"}), "spec.worker.precision: "),
    ],
)
async def test_a_spec_of_another_version_is_refused_with_its_field_and_only_once(api, key, resource, words):
    server, client = api
    plural = FINETUNES.plural if key == TUNE else YUAN_SERVICES.plural
    async with aiohttp.ClientSession() as http:
        passes = Passes(client, http, key, resource)
        answer_status(server, plural, resource, {})
        assert await passes.reconcile(key) is None
        patch = server.asked[0][3]["status"]
        answered = {"phase": patch["phase"], "observedGeneration": 2, "conditions": patch["conditions"]}
        resource["status"] = answered
        resource["metadata"]["resourceVersion"] = "3"
        before = len(server.asked)
        assert await passes.reconcile(key) is None
    accepted = patch["conditions"][0]
    assert (accepted["type"], accepted["status"], accepted["reason"]) == ("Accepted", "False", "InvalidSpec")
    assert accepted["message"].startswith(words)
    assert "\n" not in accepted["message"]
    assert [entry[3]["reason"] for entry in server.asked if entry[1] == EVENTS] == ["InvalidSpec"]
    assert len(server.asked) == before, "nothing new is not written again"


async def test_a_resource_that_is_being_deleted_is_left_to_the_garbage_collector(api):
    server, client = api
    resource = finetune_object("alpaca", "demo")
    resource["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    async with aiohttp.ClientSession() as http:
        passes = Passes(client, http, TUNE, resource)
        assert await passes.reconcile(TUNE) is None
        assert await passes.reconcile(Key("Yuan2FineTune", "demo", "another")) is None
    assert server.asked == []


BROKEN = [
    ({"attempts": "many"}, "status.attempts: Input should be a valid list"),
    (
        {"attempts": [{"number": 1, "outcome": "Vanished"}], "attempt": 1},
        "status.attempts.0.outcome: Input should be ",
    ),
    ({"conditions": "none"}, "status.conditions: Input should be a valid list"),
]


@pytest.mark.parametrize(("status", "words"), BROKEN)
async def test_a_status_that_cannot_be_read_is_refused_and_nothing_begins(api, status, words):
    server, client = api
    resource = finetune_object("alpaca", "demo")
    resource["status"] = status
    async with aiohttp.ClientSession() as http:
        passes = Passes(client, http, TUNE, resource)
        answer_status(server, FINETUNES.plural, resource, {})
        assert await passes.reconcile(TUNE) is None
        patch = server.asked[0][3]["status"]
        resource["status"] = {**status, **patch}
        resource["metadata"]["resourceVersion"] = "3"
        before = len(server.asked)
        if isinstance(status.get("conditions", []), list):
            assert await passes.reconcile(TUNE) is None
    assert len(server.asked) == before, "nothing new is not written again"
    [accepted] = patch["conditions"]
    assert (accepted["type"], accepted["status"]) == ("Accepted", "False")
    assert accepted["reason"] == "StatusUnreadable"
    assert accepted["message"].startswith(words)
    assert accepted["message"].endswith(
        "; nothing is begun or ended while the status cannot be read: install the operator that wrote it, or "
        "restore it from a backup"
    )
    assert {entry[0] for entry in server.asked} == {"PATCH", "POST"}
    assert "attempts" not in patch


async def test_the_other_conditions_of_a_status_that_cannot_be_read_stay(api):
    server, client = api
    complete = {"type": "Complete", "status": "True", "reason": "Succeeded", "message": "", "novel": 1}
    resource = finetune_object("alpaca", "demo")
    resource["status"] = {"attempts": "many", "conditions": [complete]}
    async with aiohttp.ClientSession() as http:
        passes = Passes(client, http, TUNE, resource)
        answer_status(server, FINETUNES.plural, resource, {})
        await passes.reconcile(TUNE)
    conditions = server.asked[0][3]["status"]["conditions"]
    assert [entry["type"] for entry in conditions] == ["Accepted", "Complete"]
    assert conditions[1] == complete


def spec_with(**changes: Any) -> dict[str, Any]:
    return merged(MINIMAL, changes)


def test_sections_that_a_newer_crd_has_added_empty_are_left_out():
    for raw in (spec_with(novel={}), spec_with(workers={"novel": {}}, runPolicy={"list": []})):
        for runs in (False, True):
            assert parse_spec(FineTuneSpec, raw, runs=runs) == Reading(spec_of())


def test_what_somebody_has_filled_is_refused_except_while_an_attempt_runs():
    raw = spec_with(workers={"novel": {"a": 1}})
    with pytest.raises(ValidationError):
        parse_spec(FineTuneSpec, raw, runs=False)
    found = parse_spec(FineTuneSpec, raw, runs=True)
    assert found.spec == spec_of()
    assert found.unknown == (
        "spec.workers.novel: Extra inputs are not permitted; correct the field, or install the CRDs of this "
        "operator's version"
    )


def test_a_value_that_is_wrong_is_refused_whatever_runs():
    for runs in (False, True):
        with pytest.raises(ValidationError):
            parse_spec(FineTuneSpec, spec_with(novel={}, model={"size": "3B"}), runs=runs)


async def test_an_attempt_that_runs_is_looked_after_whatever_a_newer_crd_has_added(api):
    server, client = api
    resource = finetune_object("alpaca", "demo", novel={"filled": True})
    resource["status"] = {"attempt": 1, "attempts": [{"number": 1, "startTime": "2026-01-01T00:00:00Z"}]}
    async with aiohttp.ClientSession() as http:
        passes = Passes(client, http, TUNE, resource)
        answer_status(server, FINETUNES.plural, resource, {})
        server.answer("POST", EVENTS, {}, 201)
        await passes.reconcile(TUNE)
    patch = next(entry[3]["status"] for entry in server.asked if entry[0] == "PATCH")
    [attempt] = patch["attempts"]
    assert (attempt["outcome"], attempt["message"]) == (
        "Disrupted",
        "Job 1 of the run was deleted by somebody else",
    )
    reasons = {entry["type"]: (entry["status"], entry["reason"]) for entry in patch["conditions"]}
    assert reasons["Accepted"] == ("False", "InvalidSpec"), "no attempt begins with what it does not know"
    assert not [entry for entry in server.asked if entry[1].endswith("/jobs")]
