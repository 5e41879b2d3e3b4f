"""What surrounds a run on the real control plane: missing things, taken names, repairs, time limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.waiting import wait_for
from yuan2_local.client import ApiError

pytestmark = pytest.mark.cluster


@pytest.fixture
def run(control_plane: Any, operator: Any, node: Any) -> Iterator[Bench]:
    with bench(control_plane, operator, node, claims=("models",)) as made:
        yield made


def test_a_missing_claim_is_named_and_picked_up_when_it_appears(run):
    run.create()
    refused = run.wait_condition("Accepted", "False", "ClaimNotFound")
    assert "PersistentVolumeClaim data, named by spec.dataset.source" in refused["message"]
    assert run.jobs() == {}
    run.claims("data")
    run.wait_condition("Accepted", "True", "Valid")
    run.pods()
    assert run.condition("Accepted")["message"] == "plan: 2 pods × 1 CPU process, ZeRO-2"


def test_a_missing_key_of_a_config_map_is_named(run):
    source = {"persistentVolumeClaim": None, "configMap": {"name": "talk", "key": "a.json"}}
    run.create(dataset={"source": source})
    run.wait_condition("Accepted", "False", "ConfigMapNotFound")
    path = f"/api/v1/namespaces/{run.namespace}/configmaps"
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "talk"}, "data": {"b.json": "[]"}}
    run.cluster.client.create(path, body)
    assert "no key a.json" in run.wait_condition("Accepted", "False", "ConfigMapKeyNotFound")["message"]
    run.cluster.client.merge(f"{path}/talk", {"data": {"a.json": "[]"}})
    run.pods()


L20 = {"nvidia.com/gpu.product": "NVIDIA-L20"}
GPUS: dict[str, Any] = {
    "model": {"size": "2B"},
    "workers": {"replicas": 1, "processesPerWorker": None, "gpusPerWorker": 8, "nodeSelector": L20},
}


def test_what_a_run_will_need_is_told_before_and_while_it_runs(run):
    run.claims("data")
    run.create(**GPUS)
    accepted = run.wait_condition("Accepted", "True")
    assert accepted["message"].startswith("plan: 1 pod × 8 GPUs, ZeRO-2; about ")
    assert set(run.status["estimate"]) == {"gpu", "memoryPerGpu", "fits"}
    run.run(count=1)
    run.says(1, samples=52_000, tokens=52_000 * 195)
    wait_for("the hours", lambda: run.status["estimate"].get("hours"))
    assert run.condition("Accepted")["message"].endswith(" min")
    assert (run.status["samples"], run.status["estimate"]["fits"]) == (52_000, True)


def test_a_run_that_will_not_fit_is_accepted_with_a_warning(run):
    run.claims("data")
    run.create(**GPUS, training={"microBatchSize": 64, "maxLength": 4096})
    accepted = run.wait_condition("Accepted", "True", "UnlikelyToFit")
    assert "an L20 has 48 GB: set training.microBatchSize to " in accepted["message"]
    assert run.status["estimate"]["fits"] is False
    run.pods(count=1)
    told = wait_for("the event", lambda: events(run, "UnlikelyToFit"))
    assert (told[0]["type"], told[0]["note"]) == ("Warning", accepted["message"])


def events(run: Bench, reason: str) -> list[dict[str, Any]]:
    path = f"/apis/events.k8s.io/v1/namespaces/{run.namespace}/events"
    return [event for event in run.cluster.client.get(path)["items"] if event["reason"] == reason]


def test_an_override_that_a_field_decides_is_named_before_a_pod_starts(run):
    run.claims("data")
    run.create(deepspeed={"overrides": {"gradient_clipping": 0.5}})
    refused = run.wait_condition("Accepted", "False", "InvalidSpec")
    assert refused["message"] == (
        "deepspeed.overrides: gradient_clipping is decided by training.maxGradNorm; set that instead"
    )
    assert run.jobs() == {}
    run.patch(deepspeed={"overrides": {"gradient_clipping": None, "steps_per_print": 10}})
    run.wait_condition("Accepted", "True")


def test_a_second_run_into_the_same_output_waits_for_the_first(run):
    run.claims("data")
    run.create()
    run.run()
    second = Bench(run.cluster, run.operator, run.node, run.namespace, name="second")
    second.create()
    refused = second.wait_condition("Accepted", "False", "OutputInUse")
    assert refused["message"].startswith(
        "output: Yuan2FineTune alpaca writes directory tuned of claim models;"
    )
    for pod in run.pods():
        run.node.end(pod, 0, run.termination("Complete", "done", step=100))
    run.wait_condition("Finished", "True", "Succeeded")
    second.wait_condition("Accepted", "True")
    assert set(run.jobs()) == {"alpaca-1", "second-1"}
    run.cluster.client.delete(f"{run.root}/second")


def refuses_jobs(run: Bench) -> bool:
    """Whether a Job would not be made."""
    container = {"name": "c", "image": "i"}
    pod = {"restartPolicy": "Never", "containers": [container]}
    job = {"metadata": {"name": "probe"}, "spec": {"template": {"spec": pod}}}
    try:
        run.cluster.client.create(f"/apis/batch/v1/namespaces/{run.namespace}/jobs?dryRun=All", job)
    except ApiError:
        return True
    return False


def test_a_spec_that_is_corrected_before_a_job_exists_is_what_that_job_runs(run):
    hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    webhook = {
        "name": "down.example.com",
        "clientConfig": {"service": {"name": "none", "namespace": run.namespace}},
        "rules": [
            {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
        ],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": run.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    body = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": run.namespace},
        "webhooks": [webhook],
    }
    run.cluster.client.create(hooks, body)
    try:
        wait_for("the API server asks the webhook", lambda: refuses_jobs(run))
        run.claims("data")
        run.create(training={"learningRate": 0.5})
        wait_for("the job file", lambda: run.objects("configmaps"))
        run.patch(training={"learningRate": 0.25})
    finally:
        run.cluster.client.delete(f"{hooks}/{run.namespace}")
    run.pods()
    job = run.jobs()["alpaca-1"]
    volumes = job["spec"]["template"]["spec"]["volumes"]
    named = next(volume["configMap"]["name"] for volume in volumes if volume["name"] == "job")
    wait_for("the earlier job file is gone", lambda: list(run.objects("configmaps")) == [named])
    assert '"learningRate":0.25' in run.config()["data"]["job.json"]
    assert job["metadata"]["annotations"]["yuan2.dev/config"] == named


def test_a_deleted_service_comes_back(run):
    run.claims("data")
    run.create()
    run.run()
    before = run.objects("services")["alpaca"]["metadata"]["uid"]
    run.cluster.kubectl("delete", "service", "alpaca", "-n", run.namespace)
    wait_for(
        "another service",
        lambda: (
            run.objects("services").get("alpaca", {"metadata": {"uid": before}})["metadata"]["uid"] != before
        ),
    )


def test_a_changed_service_is_repaired(run):
    run.claims("data")
    run.create()
    run.run()
    path = f"/api/v1/namespaces/{run.namespace}/services/alpaca"
    run.cluster.client.merge(path, {"spec": {"publishNotReadyAddresses": False}})
    wait_for("the repair", lambda: run.cluster.client.get(path)["spec"].get("publishNotReadyAddresses"))


def test_a_taken_name_is_left_alone_and_said(run):
    path = f"/api/v1/namespaces/{run.namespace}/services"
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "alpaca"},
        "spec": {"selector": {"app": "mine"}, "ports": [{"port": 80}]},
    }
    run.cluster.client.create(path, body)
    run.claims("data")
    run.create()
    refused = run.wait_condition("Running", "False", "ReconcileFailed")
    assert "Service alpaca exists and does not belong to Yuan2FineTune alpaca" in refused["message"]
    assert run.cluster.client.get(f"{path}/alpaca")["spec"]["selector"] == {"app": "mine"}
    assert run.jobs() == {}


def test_a_deadline_over_all_attempts_ends_the_run(run):
    run.claims("data")
    run.create(runPolicy={"activeDeadlineSeconds": 3})
    run.run()
    failed = run.wait_condition("Failed", "True", "DeadlineExceeded")
    assert "activeDeadlineSeconds (3 s)" in failed["message"]
    wait_for("the pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"])


def test_pods_of_a_finished_run_go_after_their_time_and_the_status_stays(run):
    run.claims("data")
    run.create(runPolicy={"ttlSecondsAfterFinished": 2})
    for pod in run.run():
        run.node.end(pod, 0, run.termination("Complete", "done", step=100))
    run.wait_condition("Complete", "True")
    wait_for("the Job is gone", lambda: not run.jobs() and not run.objects("configmaps"))
    assert run.status["phase"] == "Complete"
    assert run.status["model"]["claimName"] == "models"


def test_a_run_of_the_same_name_waits_for_the_pods_of_the_deleted_one(run):
    run.claims("data")
    run.create()
    old = run.run()
    run.cluster.client.delete(f"{run.root}/alpaca")
    # The garbage collector looks for kinds that were installed after its start every 30 s.
    wait_for("the old pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"], 75)
    wait_for("the resource is gone", lambda: not run.cluster.client.get(run.root)["items"])
    run.create()
    wait_for("the status of the new one", lambda: run.status.get("phase") == "Pending")
    assert {pod["metadata"]["uid"] for pod in run.pods()} == {pod["metadata"]["uid"] for pod in old}
    for pod in old:
        run.node.confirm_deletion(pod)
    wait_for(
        "the new pods",
        lambda: {pod["metadata"]["uid"] for pod in run.pods()}.isdisjoint(
            {p["metadata"]["uid"] for p in old}
        ),
        30,
    )


def test_a_pod_that_fits_no_node_is_explained(run):
    run.claims("data")
    run.create()
    pod = run.pods()[0]
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available.",
    }
    path = f"/api/v1/namespaces/{run.namespace}/pods/{pod['metadata']['name']}/status"
    run.cluster.client.merge(path, {"status": {"conditions": [unschedulable]}})
    told = run.wait_condition("Running", "False", "Unschedulable")
    assert (
        "wants 1 cpu, 1Gi memory and fits no node: 0/3 nodes are available: 3 Insufficient cpu"
        in told["message"]
    )
    assert "none of 1 node has 1 cpu free, 2 are needed; the next has 0 (0 of 2 pods run)" in told["message"]


def test_sigterm_ends_the_operator_cleanly(run):
    assert run.operator.stop() == 0
    run.operator.start()
