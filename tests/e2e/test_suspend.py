"""A run that is suspended, and one whose pod is deleted, go on where they stood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, finetune, namespace
from tests.support.training import losses, write_data, write_model

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


def patch(made: Namespace, name: str, suspend: bool) -> None:
    change = json.dumps({"spec": {"runPolicy": {"suspend": suspend}}})
    made.kubectl("patch", "y2ft", name, "--type=merge", "-p", change)


@pytest.mark.node
def test_suspended_resumed_and_robbed_of_its_pod_equals_unbroken(bench: tuple[Namespace, Path]) -> None:
    made, directory = bench
    made.apply(finetune("unbroken", **RUN), finetune("broken", **RUN))
    made.reach("broken", 30, SECONDS)
    patch(made, "broken", suspend=True)
    made.wait("y2ft/broken", "Suspended", 120)
    assert made.status("y2ft", "broken")["phase"] == "Suspended"
    assert not made.running_pod("broken", 0)

    patch(made, "broken", suspend=False)
    made.reach("broken", 120, SECONDS)
    made.kubectl("delete", "pod", made.running_pod("broken", 0), "--wait=false")
    made.wait("y2ft/broken", "Complete", SECONDS)
    made.wait("y2ft/unbroken", "Complete", SECONDS)
    status = made.status("y2ft", "broken")
    assert status["restarts"] == 0
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Suspended", "Disrupted", "Succeeded"]
    assert status["resumedFromStep"] >= 100
    assert len(losses(directory / "out" / "broken")) == STEPS
    assert losses(directory / "out" / "broken") == losses(directory / "out" / "unbroken")


@pytest.mark.node
def test_an_evicted_pod_is_a_disruption_and_the_run_ends_as_if_unbroken(
    bench: tuple[Namespace, Path],
) -> None:
    """Two pods, one of which is evicted as a node drain does it."""
    made, directory = bench
    two = {**RUN, "workers": {"replicas": 2}}
    made.apply(finetune("evicted", **two))
    made.reach("evicted", 30, SECONDS)
    made.evict(made.running_pod("evicted", 1))
    made.wait("y2ft/evicted", "Complete", SECONDS)
    status = made.status("y2ft", "evicted")
    assert status["restarts"] == 0
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Disrupted", "Succeeded"]
    assert [attempt["counted"] for attempt in status["attempts"]] == [False, False]
    assert status["resumedFromStep"] >= 30

    made.apply(finetune("undisturbed", **two))
    made.wait("y2ft/undisturbed", "Complete", SECONDS)
    assert len(losses(directory / "out" / "evicted")) == STEPS
    assert losses(directory / "out" / "evicted") == losses(directory / "out" / "undisturbed")
