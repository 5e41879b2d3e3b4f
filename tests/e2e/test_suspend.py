"""A run that is suspended, and one whose pod is deleted, go on where they stood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, finetune, namespace
from tests.support.training import losses, write_data, write_model
from yuan2_local.errors import ClusterError

SECONDS = 240.0
STEPS = 1000
RUN = {"training": {"maxSteps": STEPS}, "checkpoint": {"everySteps": 25, "keep": 2}}


@pytest.fixture(scope="module")
def bench(operated: TestCluster) -> Iterator[tuple[Namespace, Path]]:
    with namespace(operated, "e2e-suspend") as made:
        directory = made.claim("models")
        write_model(directory / "model")
        write_data(directory / "data.json", 24)
        yield made, directory


def reach(made: Namespace, name: str, step: int) -> None:
    made.until(f"step {step} of {name}", lambda: _step(made, name) >= step, SECONDS)


def _step(made: Namespace, name: str) -> int:
    """Of rank 0's own word, through the API server's proxy as a user's tool would ask it."""
    pod = made.running_pod(name, 0)
    if not pod:
        return 0
    try:
        path = f"/api/v1/namespaces/{made.name}/pods/{pod}:9390/proxy/progress"
        return int(json.loads(made.kubectl("get", "--raw", path))["step"])
    except ClusterError:  # the pod is starting or ending
        return 0


def patch(made: Namespace, name: str, suspend: bool) -> None:
    change = json.dumps({"spec": {"runPolicy": {"suspend": suspend}}})
    made.kubectl("patch", "y2ft", name, "--type=merge", "-p", change)


@pytest.mark.node
def test_suspended_and_resumed_equals_unbroken(bench: tuple[Namespace, Path]) -> None:
    made, directory = bench
    made.apply(finetune("unbroken", **RUN), finetune("broken", **RUN))
    reach(made, "broken", 30)
    patch(made, "broken", suspend=True)
    made.wait("y2ft/broken", "Suspended", 120)
    assert made.status("y2ft", "broken")["phase"] == "Suspended"
    assert not made.running_pod("broken", 0)

    patch(made, "broken", suspend=False)
    made.wait("y2ft/broken", "Complete", SECONDS)
    made.wait("y2ft/unbroken", "Complete", SECONDS)
    status = made.status("y2ft", "broken")
    assert status["restarts"] == 0
    assert status["resumedFromStep"] >= 30
    assert len(losses(directory / "out" / "broken")) == STEPS
    assert losses(directory / "out" / "broken") == losses(directory / "out" / "unbroken")


@pytest.mark.node
def test_a_deleted_pod_is_a_disruption(bench: tuple[Namespace, Path]) -> None:
    made, directory = bench
    made.apply(finetune("robbed", **RUN))
    reach(made, "robbed", 30)
    made.kubectl("delete", "pod", made.running_pod("robbed", 0), "--wait=false")
    made.wait("y2ft/robbed", "Complete", SECONDS)
    status = made.status("y2ft", "robbed")
    assert status["restarts"] == 0
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Disrupted", "Succeeded"]
    assert len(losses(directory / "out" / "robbed")) == STEPS
