"""The life of a Yuan2Service on the real control plane; only node and kubelet are played."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.waiting import wait_for
from yuan2_operator.manifests.service import ADDRESS_SECONDS

pytestmark = pytest.mark.cluster

NAME = "assistant"


class Service:
    """Handles of one Yuan2Service beside the FineTune of a bench."""

    def __init__(self, run: Bench) -> None:
        self.run, self.client = run, run.cluster.client
        self.root = f"/apis/yuan2.dev/v1alpha1/namespaces/{run.namespace}/yuan2services"

    def create(self, **spec: Any) -> None:
        body = {
            "apiVersion": "yuan2.dev/v1alpha1",
            "kind": "Yuan2Service",
            "metadata": {"name": NAME, "namespace": self.run.namespace},
            "spec": {"model": {"name": "yuan2", "fineTuneRef": {"name": "alpaca"}}, **spec},
        }
        self.client.create(self.root, body)

    def patch(self, **spec: Any) -> None:
        self.client.merge(f"{self.root}/{NAME}", {"spec": spec})

    @property
    def status(self) -> dict[str, Any]:
        return self.client.get(f"{self.root}/{NAME}").get("status", {})

    def wait_condition(self, kind: str, status: str, reason: str | None = None) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            conditions = self.status.get("conditions", ())
            found = next((entry for entry in conditions if entry["type"] == kind), {})
            return found if found.get("status") == status and reason in (None, found["reason"]) else {}

        return wait_for(f"{kind}={status} {reason or ''}", look)

    def names(self, api: str, plural: str) -> set[str]:
        """Names of the namespace's objects of a kind."""
        items = self.client.get(f"/apis/{api}/namespaces/{self.run.namespace}/{plural}")["items"]
        return {item["metadata"]["name"] for item in items}

    def deployments(self) -> dict[str, dict[str, Any]]:
        items = self.client.get(f"/apis/apps/v1/namespaces/{self.run.namespace}/deployments")["items"]
        return {deployment["metadata"]["name"]: deployment for deployment in items}

    def pods(self, count: int) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]]:
            pods = self.run.node.pods(self.run.namespace, f"yuan2.dev/service={NAME}")
            return pods if len(pods) == count else []

        return wait_for(f"{count} pods of the service", look)

    def leaving(self) -> list[dict[str, Any]]:
        pods = self.run.node.pods(self.run.namespace, f"yuan2.dev/service={NAME}")
        return [pod for pod in pods if "deletionTimestamp" in pod["metadata"]]

    def run_pods(self, count: int = 3) -> None:
        for pod in self.pods(count):
            if pod["status"]["phase"] == "Pending":
                self.run.node.run(pod)


@pytest.fixture
def service(control_plane: Any, operator: Any, node: Any) -> Iterator[Service]:
    with bench(control_plane, operator, node) as run:
        yield Service(run)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def train(service: Service) -> None:
    """The FineTune that the service names runs to its end."""
    run = service.run
    run.create(workers={"replicas": 1})
    for pod in run.run(count=1):
        run.node.end(pod, 0, run.termination("Complete", "done", step=100))
    run.wait_condition("Complete", "True")


def test_a_service_waits_for_its_finetune_and_serves_what_it_made(service):
    service.create()
    refused = service.wait_condition("Accepted", "False", "FineTuneNotFound")
    assert "Yuan2FineTune alpaca does not exist" in refused["message"]
    assert service.deployments() == {}
    service.run.create(workers={"replicas": 1})
    service.wait_condition("Accepted", "False", "FineTuneNotComplete")
    for pod in service.run.run(count=1):
        service.run.node.end(pod, 0, service.run.termination("Complete", "done", step=100))
    service.wait_condition("Accepted", "True")
    service.run_pods()
    service.wait_condition("Ready", "True")
    status = service.status
    assert (status["workers"], status["readyWorkers"]) == ("1/1", 1)
    assert status["url"] == f"http://{NAME}-api.{service.run.namespace}.svc:8505/v1"
    assert (status["model"]["claimName"], status["model"]["path"]) == ("models", "tuned/model")
    assert set(service.deployments()) == {f"{NAME}-controller", f"{NAME}-worker", f"{NAME}-api"}
    run = service.run
    parts = {f"{NAME}-worker", f"{NAME}-api"}
    assert service.names("policy/v1", "poddisruptionbudgets") == parts
    networks = service.names("networking.k8s.io/v1", "networkpolicies")
    assert networks == {f"{NAME}-controller", f"{NAME}-worker"}
    assert {name.rpartition("-")[0] for name in run.objects("configmaps") if NAME in name} == parts
    run.cluster.kubectl("wait", "--for=condition=Ready", f"y2svc/{NAME}", "-n", run.namespace, "--timeout=5s")


def worker_of(service: Service) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the worker is told, and its pod."""
    pod = service.deployments()[f"{NAME}-worker"]["spec"]["template"]["spec"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "job"]
    config = service.run.objects("configmaps")[volume["configMap"]["name"]]
    return json.loads(config["data"]["job.json"]), pod


@pytest.mark.parametrize("merge", [False, True], ids=["beside its model", "merged"])
def test_an_adapter_is_served(service, merge):
    run = service.run
    run.claims("outputs")
    output = {"persistentVolumeClaim": {"claimName": "outputs", "path": "support"}, "mergeAdapter": merge}
    run.create(workers={"replicas": 1}, method={"full": None, "lora": {}}, output=output)
    for pod in run.run(count=1):
        run.node.end(pod, 0, run.termination("Complete", "done", step=100))
    run.wait_condition("Complete", "True")
    service.create()
    service.run_pods()
    service.wait_condition("Ready", "True")
    job, pod = worker_of(service)
    mounts = {m["mountPath"]: m.get("readOnly") for m in pod["containers"][0]["volumeMounts"]}
    if merge:
        assert (job["modelPath"], job.get("adapterPath")) == ("/mnt/claims/outputs/support/model", None)
    else:
        assert job["modelPath"] == "/mnt/claims/models/base"
        assert job["adapterPath"] == "/mnt/claims/outputs/support/adapter"
        assert mounts["/mnt/claims/models"] is True
        assert service.status["model"]["adapter"] == {"claimName": "outputs", "path": "support/adapter"}
    assert mounts["/mnt/claims/outputs"] is True


def test_ready_waits_until_the_nodes_know_the_address_of_the_api(service):
    train(service)
    service.create()
    service.run_pods()
    ready = service.wait_condition("Ready", "True")
    service.wait_condition("Progressing", "False", "RolledOut")
    [api] = [pod for pod in service.pods(3) if pod["metadata"]["labels"]["yuan2.dev/component"] == "api"]
    since = next(entry for entry in api["status"]["conditions"] if entry["type"] == "Ready")
    waited = moment(ready["lastTransitionTime"]) - moment(since["lastTransitionTime"])
    assert waited >= timedelta(seconds=ADDRESS_SECONDS)


def test_a_changed_api_pod_is_replaced_without_a_gap(service):
    train(service)
    service.create()
    service.run_pods()
    ready = service.wait_condition("Ready", "True")
    service.wait_condition("Progressing", "False")
    service.patch(api={"resources": {"requests": {"cpu": "200m"}}})
    service.run_pods(4)
    service.wait_condition("Progressing", "True")
    [old] = wait_for("the old pod is ended", service.leaving)
    assert service.deployments()[f"{NAME}-api"]["status"]["availableReplicas"] >= 1
    service.run.node.confirm_deletion(old)
    service.wait_condition("Progressing", "False", "RolledOut")
    assert service.wait_condition("Ready", "True")["lastTransitionTime"] == ready["lastTransitionTime"]


def test_what_is_as_it_should_be_is_not_applied_again(service):
    train(service)
    service.create()
    service.run_pods()
    service.wait_condition("Ready", "True")
    before = service.run.operator.api_requests()
    service.client.merge(f"{service.root}/{NAME}", {"metadata": {"labels": {"seen": "again"}}})
    service.client.merge(f"{service.run.root}/alpaca", {"metadata": {"labels": {"seen": "again"}}})
    service.patch(worker={"replicas": 2})
    wait_for("two workers", lambda: service.deployments()[f"{NAME}-worker"]["spec"]["replicas"] == 2)
    service.pods(4)
    after = service.run.operator.api_requests()
    applied = {key: after[key] - before.get(key, 0) for key in after if key[0] == "apply"}
    changed = {resource: count for (_, resource), count in applied.items() if count}
    assert changed == {"deployments": 1}


def test_scale_is_honoured_through_the_subresource(service):
    train(service)
    service.create()
    service.pods(3)
    run = service.run
    run.cluster.kubectl("scale", f"y2svc/{NAME}", "--replicas=3", "-n", run.namespace)
    wait_for("three workers", lambda: service.deployments()[f"{NAME}-worker"]["spec"]["replicas"] == 3)


def test_a_deployment_changed_by_hand_is_repaired(service):
    train(service)
    service.create()
    service.pods(3)
    path = f"/apis/apps/v1/namespaces/{service.run.namespace}/deployments/{NAME}-api"
    service.client.merge(path, {"spec": {"replicas": 5}})
    wait_for("the repair", lambda: service.client.get(path)["spec"]["replicas"] == 1)


def test_an_operator_killed_midway_makes_nothing_twice(service):
    train(service)
    service.create()
    before = {name: made["metadata"]["uid"] for name, made in wait_for("all", service.deployments).items()}
    service.run.operator.kill()
    service.run.operator.start()
    service.run_pods()
    service.wait_condition("Ready", "True")
    after = {name: made["metadata"]["uid"] for name, made in service.deployments().items()}
    assert before.items() <= after.items()
    assert len(after) == 3


def test_a_missing_secret_is_named_and_picked_up(service):
    train(service)
    service.create(api={"keysSecret": {"name": "keys"}})
    assert "Secret keys" in service.wait_condition("Accepted", "False", "SecretNotFound")["message"]
    path = f"/api/v1/namespaces/{service.run.namespace}/secrets"
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"a": "sk-1"}}
    service.client.create(path, body)
    service.wait_condition("Accepted", "True")
    service.pods(3)


def test_deletion_takes_the_children_along_and_leaves_the_finetune(service):
    train(service)
    service.create()
    service.pods(3)
    service.client.delete(f"{service.root}/{NAME}")
    # The garbage collector looks for kinds that were installed after its start every 30 s.
    wait_for("no deployment", lambda: not service.deployments(), 75)
    wait_for("only the FineTune's Service", lambda: set(service.run.objects("services")) <= {"alpaca"})
    assert service.run.status["phase"] == "Complete"
