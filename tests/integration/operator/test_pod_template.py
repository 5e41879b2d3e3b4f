"""podTemplate on the real control plane: the pods have it, and what is wrong with it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench

pytestmark = pytest.mark.cluster


@pytest.fixture
def run(control_plane: Any, operator: Any, node: Any) -> Iterator[Bench]:
    with bench(control_plane, operator, node) as made:
        yield made


def test_a_template_is_corrected_until_the_pods_have_it(run):
    run.create(workers={"podTemplate": {"spec": {"hostNetwork": True}}})
    refused = run.wait_condition("Accepted", "False", "InvalidSpec")
    assert refused["message"].startswith("spec.workers.podTemplate.spec.hostNetwork: ")
    assert not run.jobs()

    run.patch(workers={"podTemplate": {"spec": {"hostNetwork": None, "schedularName": "other"}}})
    refused = run.wait_condition("Running", "False", "ReconcileFailed")
    assert "schedularName" in refused["message"]
    assert not run.jobs()

    overlay = {
        "schedularName": None,
        "schedulerName": "other",
        "securityContext": {"runAsUser": 4711, "runAsGroup": 4711},
        "containers": [{"name": "pytorch", "env": [{"name": "NEW", "value": "1"}]}],
    }
    run.patch(workers={"podTemplate": {"metadata": {"labels": {"cost": "a"}}, "spec": overlay}})
    pods = run.pods()
    for pod in pods:
        assert pod["spec"]["schedulerName"] == "other"
        assert pod["metadata"]["labels"]["cost"] == "a"
        context = pod["spec"]["securityContext"]
        assert (context["runAsUser"], context["fsGroup"], context["runAsNonRoot"]) == (4711, 1000, True)
        [container] = pod["spec"]["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert (values["NEW"], values["WORLD_SIZE"]) == ("1", "2")
    run.run()


def test_null_reaches_the_operator(run):
    """`fsGroup: null` is how storage without it is told; the API server keeps it."""
    run.create(workers={"podTemplate": {"spec": {"securityContext": {"fsGroup": None}}}})
    for pod in run.pods():
        assert "fsGroup" not in pod["spec"]["securityContext"]
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
