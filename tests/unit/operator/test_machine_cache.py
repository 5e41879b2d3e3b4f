"""The cache reads its own writes, and forgets them when the watch has caught up."""

from __future__ import annotations

from typing import Any

from tests.support.api_server import api
from yuan2_operator.cache import Cache, slim
from yuan2_operator.handlers.watched import WATCHED, audit
from yuan2_operator.queue import Key

__all__ = ["api"]

KEY = Key("Yuan2FineTune", "demo", "alpaca")


def job(version: int, name: str = "alpaca-1", uid: str = "u1", **metadata: Any) -> dict[str, Any]:
    fields = {"name": name, "namespace": "demo", "uid": uid, "resourceVersion": str(version), **metadata}
    return {"kind": "Job", "metadata": fields, "spec": {}, "status": {}}


def cache_of(*jobs: dict[str, Any]) -> tuple[Cache, dict[Key, list[dict[str, Any]]]]:
    index = {KEY: list(jobs)}
    return Cache({"jobs": index}), index


def versions(cache: Cache) -> list[str]:
    return [obj["metadata"]["resourceVersion"] for obj in cache.of("jobs", KEY)]


def test_a_write_is_seen_before_the_watch_shows_it():
    cache, index = cache_of()
    cache.remember("jobs", KEY, job(5))
    assert versions(cache) == ["5"]
    index[KEY].append(job(5))
    assert versions(cache) == ["5"]
    index[KEY][0] = job(9)
    assert versions(cache) == ["9"]


def test_an_older_watch_event_does_not_hide_a_write():
    cache, index = cache_of(job(3))
    cache.remember("jobs", KEY, job(5))
    assert versions(cache) == ["5"]
    index[KEY][0] = job(4)
    assert versions(cache) == ["5"]


def test_what_was_deleted_is_forgotten():
    cache, _ = cache_of()
    cache.remember("jobs", KEY, job(5))
    cache.forget("jobs", KEY, "alpaca-1", "another")
    assert versions(cache) == ["5"]
    cache.forget("jobs", KEY, "alpaca-1", "u1")
    assert versions(cache) == []


def test_a_deletion_that_was_asked_for_shows_at_once():
    cache, index = cache_of(job(5))
    cache.remember_deletion("jobs", KEY, index[KEY][0], "2026-01-01T00:00:00Z")
    assert "deletionTimestamp" in cache.of("jobs", KEY)[0]["metadata"]
    assert "deletionTimestamp" not in index[KEY][0]["metadata"]
    index[KEY][0] = job(6)
    assert "deletionTimestamp" not in cache.of("jobs", KEY)[0]["metadata"]


def test_what_vanished_unseen_is_hidden_until_the_watch_tells():
    cache, index = cache_of(job(5), job(6, "alpaca-2", "u2"))
    assert cache.uids("jobs", "demo") == {"u1", "u2"}
    assert cache.uids("jobs", "other") == set()
    cache.hide({"u1"})
    assert [obj["metadata"]["uid"] for obj in cache.of("jobs", KEY)] == ["u2"]
    del index[KEY][0]
    cache.forget("jobs", KEY, "alpaca-1", "u1")
    assert len(cache.of("jobs", KEY)) == 1


def test_one_of_them_and_itself():
    cache, _ = cache_of(job(5), job(6, "alpaca", "u2"))
    assert cache.one("jobs", KEY, "alpaca-1")["metadata"]["uid"] == "u1"
    assert cache.itself("jobs", KEY)["metadata"]["uid"] == "u2"
    assert cache.one("jobs", KEY, "none") is None


def test_an_answer_that_comes_after_the_watchs_word_brings_nothing_back(monkeypatch):
    monkeypatch.setattr("yuan2_operator.cache.DEPARTED_KEPT", 2)
    cache = Cache({"jobs": {}})
    job = {"kind": "Job", "metadata": {"name": "x-1", "uid": "u1", "resourceVersion": "5"}}
    cache.forget("jobs", KEY, "x-1", "u1")
    cache.remember_deletion("jobs", KEY, job, "2026-01-01T00:00:00Z")
    assert cache.of("jobs", KEY) == []
    for uid in ("u2", "u3"):
        cache.forget("jobs", KEY, "x-1", uid)
    cache.remember("jobs", KEY, job)
    assert len(cache.of("jobs", KEY)) == 1, "only the last ones are remembered"


def test_what_an_audit_has_missed_is_hidden_also_if_it_was_written_by_us():
    cache = Cache({"jobs": {}})
    cache.remember(
        "jobs", KEY, {"kind": "Job", "metadata": {"name": "x-1", "uid": "u1", "resourceVersion": "5"}}
    )
    cache.hide({"u1"})
    assert cache.of("jobs", KEY) == []


async def test_the_audit_notices_what_vanished_of_every_kind(api):
    server, client = api
    indices = {}
    for resource in WATCHED:
        gone, kept = ({"metadata": {"name": name, "uid": f"{resource.plural}-{name}"}} for name in ("a", "b"))
        indices[resource.plural] = {KEY: [gone, kept]}
        server.answer("GET", resource.path("demo"), {"items": [kept]})
    cache = Cache(indices)
    await audit(cache, client, ("demo",))
    left = {plural: [obj["metadata"]["name"] for obj in cache.of(plural, KEY)] for plural in indices}
    assert left == {plural: ["b"] for plural in indices}


def test_only_what_decisions_need_is_kept():
    pod = {
        "kind": "Pod",
        "metadata": {"name": "p", "managedFields": ["long"], "labels": {"a": "b"}},
        "spec": {
            "nodeName": "n",
            "volumes": [
                {"name": "v", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
                {"name": "w", "emptyDir": {}},
            ],
            "containers": [{"name": "c", "env": ["long"], "image": "i"}],
        },
        "status": {"phase": "Running"},
    }
    assert slim(pod) == {
        "kind": "Pod",
        "metadata": {"name": "p", "labels": {"a": "b"}},
        "spec": {
            "nodeName": "n",
            "containers": [{"name": "c", "image": "i"}],
            "volumes": [{"persistentVolumeClaim": {"claimName": "data"}}],
        },
        "status": {"phase": "Running"},
    }
    assert slim({"kind": "Job", "metadata": {}, "spec": {"template": "long", "suspend": True}})["spec"] == {
        "suspend": True
    }
    assert slim({"kind": "Service", "metadata": {}, "spec": {"ports": []}})["spec"] == {"ports": []}
