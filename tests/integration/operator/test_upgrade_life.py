"""A run that the release before has begun, taken over by this operator on the real control plane."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

PREVIOUS = Path(__file__).parents[2] / "golden" / "previous"
PLURALS = {"ConfigMap": "/api/v1", "Service": "/api/v1", "Job": "/apis/batch/v1"}


@pytest.fixture
def run(control_plane: Any, operator: Any, node: Any) -> Iterator[Bench]:
    with bench(control_plane, operator, node, claims=("identity-base", "identity-output")) as made:
        made.name = "identity"
        yield made


def restore(run: Bench) -> None:
    """The objects as the release before left them, with no operator at work."""
    data = {"metadata": {"name": "identity-data"}, "data": {"conversations.json": "[]"}}
    run.cluster.client.create(f"/api/v1/namespaces/{run.namespace}/configmaps", data)
    resource = yaml.safe_load((PREVIOUS / "finetune.yaml").read_text())
    metadata = {"name": run.name, "namespace": run.namespace}
    made = run.cluster.client.create(run.root, {**resource, "metadata": metadata, "status": None})
    run.cluster.client.merge(f"{run.root}/{run.name}/status", {"status": resource["status"]})
    for child in yaml.safe_load_all((PREVIOUS / "children.yaml").read_text()):
        child["metadata"] |= {"namespace": run.namespace}
        child["metadata"]["ownerReferences"][0]["uid"] = made["metadata"]["uid"]
        path = f"{PLURALS[child['kind']]}/namespaces/{run.namespace}/{child['kind'].lower()}s"
        run.cluster.client.create(path, child)


def test_a_run_of_the_release_before_goes_on_and_ends_as_if_nothing_had_been(run):
    run.operator.kill()
    restore(run)
    for pod in run.pods():
        run.node.run(pod, ip=run.trainer.address)
    run.operator.start()
    run.says(step=60, last_checkpoint_step=40)
    wait_for("its progress", lambda: run.status.get("step") == 60)
    assert run.status["attempts"][0]["image"] == "registry.example/yuan2/train:1"
    message = run.termination("Complete", "trained to the end", step=100)
    for pod in run.pods():
        run.node.end(pod, 0, message)
    run.wait_condition("Finished", "True", "Succeeded")
    assert set(run.jobs()) == {"identity-1"}
    assert set(run.objects("configmaps")) == {"identity-1", "identity-data"}
    assert [attempt["number"] for attempt in run.status["attempts"]] == [1]


def test_a_run_of_the_release_before_that_fails_goes_on_with_its_image(run):
    run.operator.kill()
    restore(run)
    image = "registry.example/yuan2/train:old"
    pods = run.pods()
    for pod in pods:
        run.node.run(pod, ip=run.trainer.address)
    path = f"{run.root}/{run.name}/status"
    first = {**run.status["attempts"][0], "image": image}
    run.cluster.client.merge(path, {"status": {"attempts": [first]}})
    run.operator.start()
    run.wait_condition("Finished", "False")
    run.node.end(pods[0], 1, run.termination("Crashed", "boom"))
    wait_for("pod 1 is ended by the Job", lambda: "deletionTimestamp" in run.pods()[1]["metadata"])
    run.node.confirm_deletion(run.pods()[1], 75)
    second = run.run(attempt=2)
    assert {pod["spec"]["containers"][0]["image"] for pod in second} == {image}
    assert run.status["attempts"][1]["image"] == image
