"""Who leads: by a Lease, measured by one's own clock; a status is written on the version that was read."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone

import pytest

from tests.support.api_server import api
from yuan2_operator.client import FINETUNES, Conflict
from yuan2_operator.handlers import leadership
from yuan2_operator.handlers.leadership import Leadership, Lost, Sighting, may_take, taken
from yuan2_operator.queue import Key, WorkQueue

__all__ = ["api"]

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
LEASES = "/apis/coordination.k8s.io/v1/namespaces/system/leases"
LEASE = f"{LEASES}/yuan2-operator"


def lease(holder: str | None = None, **spec):
    held = {} if holder is None else {"holderIdentity": holder, "leaseDurationSeconds": 10}
    metadata = {"name": "yuan2-operator", "namespace": "system", "resourceVersion": "1"}
    return {"metadata": metadata, "spec": {**held, **spec}}


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [(None, 0, True), ("", 0, True), ("me", 0, True), ("other", 10, False), ("other", 10.1, True)],
)
def test_a_lease_is_taken_when_it_is_free_or_old(holder, age, free):
    assert may_take(Sighting(lease(holder), 100.0), "me", 100.0 + age) is free


def test_the_age_begins_anew_with_every_renewal():
    seen = Sighting(lease("other", renewTime="a"), 1.0)
    assert seen.next(lease("other", renewTime="a"), 5.0).at == 1.0
    assert seen.next(lease("other", renewTime="b"), 5.0).at == 5.0


def test_a_takeover_is_counted_and_a_renewal_is_not():
    first = taken(lease(), "a", NOW)
    assert (first["spec"]["holderIdentity"], first["spec"]["leaseTransitions"]) == ("a", 0)
    again = taken(first, "a", NOW)
    assert again["spec"]["leaseTransitions"] == 0
    assert taken(again, "b", NOW)["spec"]["leaseTransitions"] == 1
    assert first["metadata"]["resourceVersion"] == "1"


async def leader(api, *answers):
    made, client = api
    for method, path, body, status in answers:
        made.answer(method, path, body, status)
    return made, Leadership(client, "system", "me", lambda: NOW, asyncio.Event())


async def test_a_lease_that_nobody_has_is_made_and_taken(api):
    made, mine = await leader(api, ("POST", LEASES, lease(), 201), ("PUT", LEASE, lease("me"), 200))
    task = asyncio.create_task(mine.run())
    await asyncio.wait_for(mine.leads.wait(), 10)
    task.cancel()
    [put] = [body for method, _, _, body, _ in made.asked if method == "PUT"]
    assert put["spec"]["holderIdentity"] == "me"
    assert put["metadata"]["resourceVersion"] == "1"
    made.answer("PUT", LEASE, lease(""))
    await mine.give_back()
    assert made.asked[-1][3]["spec"]["holderIdentity"] == ""


async def test_a_lease_of_another_is_left_alone(api):
    made, mine = await leader(api, ("GET", LEASE, lease("other"), 200))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(mine.run(), 0.5)
    assert not mine.leads.is_set()
    assert [method for method, *_ in made.asked] == ["GET"]


async def test_a_leader_whose_lease_was_taken_ends(api, monkeypatch):
    monkeypatch.setattr(leadership, "RENEW_SECONDS", 0.01)
    _, mine = await leader(
        api,
        ("GET", LEASE, lease(), 200),
        ("PUT", LEASE, lease("me"), 200),
        ("PUT", LEASE, {"message": "the object has been modified"}, 409),
    )
    with pytest.raises(Lost):
        await asyncio.wait_for(mine.run(), 10)


async def test_workers_wait_until_they_may_work():
    worked: list[Key] = []
    done = asyncio.Event()

    async def process(key: Key) -> None:
        worked.append(key)
        done.set()

    queue, gate = WorkQueue(process, workers=2, settle=0.0), asyncio.Event()
    tasks = queue.start(after=gate)
    queue.add(Key("Yuan2FineTune", "demo", "alpaca"))
    await asyncio.sleep(0.05)
    assert worked == []
    gate.set()
    await asyncio.wait_for(done.wait(), 10)
    for task in tasks:
        task.cancel()


async def test_a_status_is_written_on_the_version_that_was_read(api):
    made, client = api
    path = FINETUNES.path("demo", "alpaca", "status")
    made.answer("PATCH", path, {"message": "the object has been modified"}, 409)
    with pytest.raises(Conflict):
        await client.patch_status(FINETUNES, "demo", "alpaca", {"step": 1}, "7")
    assert made.asked[-1][3] == {"status": {"step": 1}, "metadata": {"resourceVersion": "7"}}
