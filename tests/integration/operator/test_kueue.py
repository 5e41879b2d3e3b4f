"""A run in a queue of a real Kueue: one Workload for its life, whatever happens to its attempts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.kueue import make_priority, make_queue, running_kueue, workloads
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

FLAVOUR = {"pool": "reserved"}
QUEUE = {"scheduling": {"queueName": "team"}}


@pytest.fixture(scope="module")
def kueue(control_plane: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_kueue(control_plane, tmp_path_factory.mktemp("kueue")):
        make_priority(control_plane, "urgent", 1000)
        yield


@pytest.fixture
def run(kueue: None, control_plane: Any, operator: Any, node: Any) -> Iterator[Bench]:
    with bench(control_plane, operator, node) as made:
        # Room for one run: two pods of one CPU each.
        make_queue(control_plane, made.namespace, 2, FLAVOUR)
        yield made


def gated(pod: dict[str, Any]) -> bool:
    return bool(pod["spec"].get("schedulingGates"))


def admitted(run: Bench, attempt: int = 1) -> list[dict[str, Any]]:
    """The pods of an attempt once their gates are open."""

    def look() -> list[dict[str, Any]]:
        pods = run.pods(attempt)
        return [] if any(map(gated, pods)) else pods

    return wait_for(f"attempt {attempt} to be admitted", look)


def start(run: Bench, attempt: int = 1) -> list[dict[str, Any]]:
    admitted(run, attempt)
    return run.run(attempt)


def condition(workload: dict[str, Any], kind: str) -> str:
    found = [entry for entry in workload.get("status", {}).get("conditions", ()) if entry["type"] == kind]
    return found[0]["status"] if found else "Absent"


@contextlib.contextmanager
def beside(run: Bench, name: str, **spec: Any) -> Iterator[Bench]:
    """Another run of the same namespace."""
    other = Bench(run.cluster, run.operator, run.node, run.namespace, name)
    other.create(output={"persistentVolumeClaim": {"path": name}}, **spec)
    with other.trainer.running():
        yield other
    run.cluster.client.delete(f"{other.root}/{name}")


def test_a_run_waits_for_quota_and_keeps_it_over_a_crash(run):
    run.create(**QUEUE)
    first = start(run)
    for pod in first:
        assert pod["spec"]["nodeSelector"] == FLAVOUR
    [workload] = workloads(run.cluster, run.namespace)
    assert condition(workload, "Admitted") == "True"
    with beside(run, "waiter", **QUEUE) as waiter:
        refused = waiter.wait_condition("Running", "False", "Unschedulable")
        assert "queue" in refused["message"]
        assert all(map(gated, waiter.pods()))

        for pod in first:
            run.node.end(pod, 1, "boom")
        second = start(run, attempt=2)
        [kept] = [
            entry
            for entry in workloads(run.cluster, run.namespace)
            if entry["metadata"]["name"] == workload["metadata"]["name"]
        ]
        assert kept["metadata"]["uid"] == workload["metadata"]["uid"]
        assert condition(kept, "Admitted") == "True"
        assert all(map(gated, waiter.pods()))
        assert run.status["restarts"] == 1

        for pod in second:
            run.node.end(pod, 0, run.termination("Complete", "trained to the end", step=100))
        run.wait_condition("Complete", "True")
        start(waiter)


def test_preemption_is_not_counted_and_the_run_comes_back(run):
    run.create(**QUEUE)
    first = start(run)
    [workload] = workloads(run.cluster, run.namespace)
    urgent = {"scheduling": {"queueName": "team", "priorityClass": "urgent"}}
    with beside(run, "urgent", **urgent) as rival:
        for pod in first:
            wait_for("SIGTERM", lambda name=pod["metadata"]["name"]: _terminating(run, name))
        preempted = run.termination("Preempted", "SIGTERM: a checkpoint of step 40", step=40)
        for pod in first:
            run.node.confirm_deletion(pod, 75, preempted)
        pods = start(rival)
        held = run.pods(2)
        assert all(map(gated, held))
        status = run.status
        assert (status["restarts"], status["disruptions"]) == (0, 1)
        assert status["lastCheckpointStep"] == 40

        done = rival.termination("Complete", "trained to the end", step=100)
        for pod in pods:
            rival.node.end(pod, 0, done)
        rival.wait_condition("Complete", "True")
        start(run, attempt=2)
        names = {
            entry["metadata"]["name"]: entry["metadata"]["uid"]
            for entry in workloads(run.cluster, run.namespace)
        }
        assert names[workload["metadata"]["name"]] == workload["metadata"]["uid"]


def test_a_suspended_run_gives_its_quota_back(run):
    run.create(**QUEUE)
    first = start(run)
    with beside(run, "waiter", **QUEUE) as waiter:
        assert all(map(gated, waiter.pods()))
        run.patch(runPolicy={"suspend": True})
        for pod in first:
            wait_for("SIGTERM", lambda name=pod["metadata"]["name"]: _terminating(run, name))
            run.node.confirm_deletion(pod, 75, run.termination("Preempted", "a checkpoint", step=40))
        run.wait_condition("Suspended", "True")
        pods = start(waiter)

        run.patch(runPolicy={"suspend": False})
        held = run.pods(2)
        assert all(map(gated, held))
        for pod in pods:
            waiter.node.end(pod, 0, waiter.termination("Complete", "trained to the end", step=100))
        start(run, attempt=2)


def test_a_failed_run_gives_its_quota_back(run):
    run.create(runPolicy={"maxRestarts": 0}, **QUEUE)
    first = start(run)
    with beside(run, "waiter", **QUEUE) as waiter:
        assert all(map(gated, waiter.pods()))
        for pod in first:
            run.node.end(pod, 1, "boom")
        run.wait_condition("Failed", "True", "TooManyRestarts")
        start(waiter)


def _terminating(run: Bench, name: str) -> bool:
    pods = {pod["metadata"]["name"]: pod for pod in run.node.pods(run.namespace)}
    return name not in pods or "deletionTimestamp" in pods[name]["metadata"]


def test_a_rank_that_had_ended_well_does_not_wedge_the_run(run):
    run.create(**QUEUE)
    first = start(run)
    run.node.end(first[0], 0, run.termination("Complete", "trained to the end", step=100))
    run.node.end(first[1], 1, "boom")
    second = start(run, attempt=2)
    for pod in second:
        run.node.end(pod, 0, run.termination("Complete", "trained to the end", step=100))
    run.wait_condition("Complete", "True")
