"""The life of a Yuan2FineTune on the real control plane; only node and kubelet are played."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.kstatus import kstatus
from tests.support.waiting import wait_for
from yuan2_core.contract import PEER_LOST

pytestmark = pytest.mark.cluster

BUDGET = 20
"""Requests that the operator may make for one FineTune from its creation to Complete."""


@pytest.fixture
def run(control_plane: Any, operator: Any, node: Any) -> Iterator[Bench]:
    with bench(control_plane, operator, node) as made:
        yield made


def complete(run: Bench, attempt: int = 1) -> None:
    message = run.termination("Complete", "trained to the end", step=100)
    for pod in run.pods(attempt):
        run.node.end(pod, 0, message)
    run.wait_condition("Complete", "True")


def test_trains_to_the_end_within_the_budget_of_requests(run):
    before = sum(run.operator.api_requests().values())
    run.create()
    run.run()
    for step in (1, 20, 40, 60, 80, 95):
        run.says(step)
        wait_for("a look at the progress", lambda asked=run.trainer.asked: run.trainer.asked > asked + 1)
    complete(run)
    spent = sum(run.operator.api_requests().values()) - before
    status = run.status
    assert status["phase"] == "Complete"
    assert (status["step"], status["totalSteps"], status["progress"]) == (100, 100, "100/100")
    assert status["model"]["path"] == "tuned/model"
    assert status["model"]["claimName"] == "models"
    assert [(attempt["outcome"], attempt["message"]) for attempt in status["attempts"]] == [
        ("Succeeded", "trained to the end")
    ]
    assert {"startTime", "firstStepTime", "completionTime"} <= set(status)
    run.cluster.kubectl(
        "wait", "--for=condition=Complete", "y2ft/alpaca", "-n", run.namespace, "--timeout=5s"
    )
    assert spent <= BUDGET, run.operator.api_requests()


def test_children_are_as_designed(run):
    run.create()
    pods = run.pods()
    uid = run.get()["metadata"]["uid"]
    children = [
        run.jobs()["alpaca-1"],
        run.config(),
        run.objects("services")["alpaca"],
    ]
    for child in children:
        reference = child["metadata"]["ownerReferences"][0]
        assert (reference["uid"], reference["controller"], reference["blockOwnerDeletion"]) == (
            uid,
            True,
            True,
        )
    assert [pod["spec"]["hostname"] for pod in pods] == ["alpaca-1-0", "alpaca-1-1"]
    assert {pod["spec"]["subdomain"] for pod in pods} == {"alpaca"}
    environment = {entry["name"]: entry.get("value") for entry in pods[1]["spec"]["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == "alpaca-1-0.alpaca"
    assert (environment["WORLD_SIZE"], environment["PET_NNODES"]) == ("2", "2")
    annotations = [pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in pods]
    assert annotations == ["0", "1"]


def test_the_users_object_is_never_written(run):
    run.create()
    run.run()
    run.says(10)
    wait_for("progress in the status", lambda: run.status.get("step") == 10)
    metadata = run.get()["metadata"]
    assert metadata["generation"] == 1
    assert "finalizers" not in metadata
    assert "annotations" not in metadata
    writers = {entry["manager"]: entry.get("subresource") for entry in metadata["managedFields"]}
    assert writers["yuan2-operator"] == "status"


def test_an_operator_killed_midway_makes_nothing_twice(run):
    run.create()
    run.run()
    run.operator.kill()
    run.says(50)
    run.operator.start()
    wait_for("progress after the restart", lambda: run.status.get("step") == 50)
    run.operator.kill()
    message = run.termination("Complete", "trained to the end", step=100)
    for pod in run.pods():
        run.node.end(pod, 0, message)
    run.operator.start()
    run.wait_condition("Complete", "True")
    assert set(run.jobs()) == {"alpaca-1"}
    assert list(run.objects("configmaps")) == [run.config()["metadata"]["name"]]
    assert len(run.pods()) == 2
    assert run.status["restarts"] == 0


def test_an_operator_killed_before_the_status_is_written_takes_over_the_job(run):
    run.create()
    run.pods()
    run.operator.kill()
    # As if the write had been lost with the process.
    run.cluster.client.merge(f"{run.root}/alpaca/status", {"status": None})
    run.operator.start()
    run.run()
    assert run.status["attempt"] == 1
    assert set(run.jobs()) == {"alpaca-1"}


def test_exit_code_78_ends_the_run_and_says_why(run):
    run.create()
    pods = run.run()
    sentence = "file alpaca.json, record 3, field conversations: the answer is empty; remove the record"
    run.node.end(pods[1], 78, run.termination("InvalidData", sentence))
    failed = run.wait_condition("Failed", "True", "InvalidData")
    assert sentence in failed["message"]
    assert pods[1]["metadata"]["name"] in failed["message"]
    assert run.status["phase"] == "Failed"
    assert set(run.jobs()) == {"alpaca-1"}
    assert run.status["attempts"][0]["outcome"] == "Invalid"


def test_a_crash_restarts_all_ranks_from_the_checkpoint(run):
    run.create()
    pods = run.run()
    run.node.end(pods[1], 1, run.termination("Crashed", "RuntimeError: CUDA error"))
    wait_for("pod 0 is ended by the Job", lambda: "deletionTimestamp" in run.pods()[0]["metadata"])
    assert set(run.jobs()) == {"alpaca-1"}, "no second attempt while a pod of the first runs"
    run.node.confirm_deletion(run.pods()[0], 75, run.termination("Preempted", "stopped", step=40))
    second = run.run(attempt=2)
    status = run.status
    assert (status["attempt"], status["restarts"]) == (2, 1)
    assert status["attempts"][0]["outcome"] == "Failed"
    assert "RuntimeError: CUDA error" in status["attempts"][0]["message"]
    assert '"attempt":2' in run.config(attempt=2)["data"]["job.json"]
    assert len(second) == 2
    complete(run, attempt=2)
    wait_for("the Service of a finished run is gone", lambda: not run.objects("services"))


def test_the_pod_that_failed_is_named_and_not_the_one_that_lost_it_and_ended_first(run):
    run.create()
    pods = run.run()
    run.node.end(pods[0], 1, run.termination(PEER_LOST, "lost contact with another rank"))
    wait_for("pod 1 is ended by the Job", lambda: "deletionTimestamp" in run.pods()[1]["metadata"])
    run.node.end(run.pods()[1], 1, run.termination("Crashed", "rank 1 was ended by signal 9"))
    wait_for("the verdict", lambda: run.status["attempts"][0].get("outcome"))
    run.node.confirm_deletion(pods[1])  # a kubelet unmounts the volumes before
    run.run(attempt=2)
    first = run.status["attempts"][0]
    assert (first["reason"], first["counted"]) == ("Crashed", True)
    assert pods[1]["metadata"]["name"] in first["message"]


def test_a_node_that_crashes_pods_again_and_again_is_avoided(run):
    run.create(runPolicy={"avoidFailedNodes": "Required"}, workers={"replicas": 1})
    for attempt in (1, 2):
        [pod] = run.run(attempt, count=1)
        run.node.end(pod, 1, run.termination("Crashed", "RuntimeError: uncorrectable ECC error"))
    run.pods(3, count=1)
    assert run.status["nodeFailures"] == {run.node.name: 2}
    [attempt, *_] = run.status["attempts"]
    assert attempt["node"] == run.node.name
    affinity = run.jobs()["alpaca-3"]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    [term] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": [run.node.name]}]
    assert kstatus(run.get()) == "Current"


def test_too_many_crashes_fail_the_run_with_a_sentence(run):
    run.create(runPolicy={"maxRestarts": 1}, workers={"replicas": 1})
    for attempt in (1, 2):
        pods = run.run(attempt, count=1)
        run.node.end(pods[0], 1, run.termination("Crashed", "ValueError: boom", step=30))
    failed = run.wait_condition("Failed", "True", "TooManyRestarts")
    for part in ("all 1 restarts", "ValueError: boom", "alpaca-2-0", "the checkpoint of step 30"):
        assert part in failed["message"]
    assert run.status["restarts"] == 1
    assert kstatus(run.get()) == "Failed"
    run.cluster.kubectl(
        "wait", "--for=condition=Finished", "y2ft/alpaca", "-n", run.namespace, "--timeout=5s"
    )


def test_an_eviction_is_not_counted(run):
    run.create()
    pods = run.run()
    name = pods[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    run.cluster.client.request("POST", f"/api/v1/namespaces/{run.namespace}/pods/{name}/eviction", eviction)
    wait_for("the eviction is noted", lambda: run.status["attempts"][0].get("reason") == "Drained")
    run.node.confirm_deletion(run.pods()[0], 75, run.termination("Preempted", "stopped", step=10))
    run.node.end(pods[1], 75, run.termination("Preempted", "stopped", step=10))
    run.run(attempt=2)
    status = run.status
    assert status["restarts"] == 0
    assert status["attempts"][0]["outcome"] == "Disrupted"
    assert status["attempts"][0].get("counted", False) is False
    assert (status["disruptions"], status["disruptionReasons"]) == (1, {"Drained": 1})


def test_progress_gives_the_restarts_back_and_a_run_without_it_ends(run):
    run.create(runPolicy={"maxRestarts": 1, "restartWindowSeconds": 0}, workers={"replicas": 1})
    crash = run.termination("Crashed", "ValueError: boom")
    for attempt, checkpoint in enumerate((10, 20, 20), start=1):
        pods = run.run(attempt, count=1)
        run.says(checkpoint + 1, attempt, last_checkpoint_step=checkpoint)
        wait_for(
            "the checkpoint in the status",
            lambda wanted=checkpoint: run.status["attempts"][-1].get("checkpointStep") == wanted,
        )
        run.node.end(pods[0], 1, crash)
    failed = run.wait_condition("Failed", "True", "TooManyRestarts")
    assert "all 1 restarts" in failed["message"]
    assert (run.status["restarts"], run.status["restartsUsed"], run.status["attempt"]) == (2, 1, 3)


def test_disruptions_without_progress_are_told_by_reason_and_capped(run):
    run.create(runPolicy={"maxDisruptionsWithoutProgress": 2}, workers={"replicas": 1})
    causes = ("PreemptionByScheduler", "DeletionByPodGC", None)
    for attempt, cause in enumerate(causes, start=1):
        [pod] = run.run(attempt, count=1)
        run.says(3, attempt)
        wait_for("rank 0 is heard", lambda: run.status["attempts"][-1].get("checkpointStep") is not None)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": cause}
        conditions = [] if cause is None else [condition]
        run.node.end(pod, 75, run.termination("Preempted", "stopped"), conditions=conditions)
    failed = run.wait_condition("Failed", "True", "NoProgress")
    assert "as were 2 before it (spec.runPolicy.maxDisruptionsWithoutProgress)" in failed["message"]
    status = run.status
    assert (status["restarts"], status["disruptions"]) == (0, 3)
    assert status["disruptionReasons"] == {"NodeLost": 1, "Preempted": 1, "Terminated": 1}


def test_a_deleted_pod_is_not_counted_even_if_its_peers_crash(run):
    run.create()
    pods = run.run()
    run.cluster.client.request(
        "DELETE", f"/api/v1/namespaces/{run.namespace}/pods/{pods[1]['metadata']['name']}", {}
    )
    wait_for("the deletion is noted", lambda: run.status["attempts"][0].get("reason") == "Disrupted")
    run.node.confirm_deletion(run.pods()[1], 137)
    with_gloo = run.termination(PEER_LOST, "lost contact with another rank: Connection closed by peer")
    run.node.end(pods[0], 1, with_gloo)
    run.run(attempt=2)
    assert run.status["restarts"] == 0
    assert pods[1]["metadata"]["name"] in run.status["attempts"][0]["message"]


def test_a_deleted_job_is_made_again_as_the_next_attempt(run):
    run.create()
    run.run()
    run.cluster.kubectl("delete", "job", "alpaca-1", "-n", run.namespace, "--wait=false")
    wait_for("the pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"])
    for pod in run.pods():
        run.node.confirm_deletion(pod, 75)
    run.run(attempt=2)
    assert run.status["restarts"] == 0


def test_suspend_stops_the_pods_and_resume_goes_on(run):
    run.create()
    run.run()
    run.says(30, last_checkpoint_step=30)
    wait_for("progress", lambda: run.status.get("step") == 30)
    run.patch(runPolicy={"suspend": True})
    wait_for("the pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"])
    assert run.condition("Suspended")["reason"] == "Suspending"
    for pod in run.pods():
        run.node.confirm_deletion(pod, 75, run.termination("Preempted", "stopped", step=30))
    suspended = run.wait_condition("Suspended", "True")
    assert "checkpoint of step 30" in suspended["message"]
    assert run.status["phase"] == "Suspended"
    assert run.jobs() == {}
    run.patch(runPolicy={"suspend": False})
    run.run(attempt=2)
    assert run.status["restarts"] == 0
    assert run.condition("Suspended")["status"] == "False"
    complete(run, attempt=2)


def test_a_run_created_suspended_makes_nothing_until_it_is_resumed(run):
    run.create(runPolicy={"suspend": True})
    run.wait_condition("Suspended", "True")
    assert run.jobs() == {}
    run.patch(runPolicy={"suspend": False})
    run.run()


def test_a_hang_restarts_the_attempt_and_counts(run):
    run.create(runPolicy={"stallTimeoutSeconds": 1})
    run.run()
    frame = '  File "/site/distributed_c10d.py", line 2810 in all_reduce'
    run.trainer.stacks = f"=== rank 0 (pid 9) ===\nCurrent thread 0x1 (most recent call first):\n{frame}\n"
    run.says(7, last_step_age_seconds=61.0, state_age_seconds=90.0)
    wait_for("the pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"])
    for pod in run.pods():
        run.node.confirm_deletion(pod, 137)
    run.trainer.progress = None
    run.run(attempt=2)
    assert run.status["restarts"] == 1
    assert run.status["attempts"][0]["outcome"] == "Stalled"
    assert "rank 0: in all_reduce (distributed_c10d.py:2810)" in run.status["attempts"][0]["message"]
    assert frame in run.operator.text()


def test_deletion_takes_the_children_along(run):
    run.create()
    run.run()
    run.cluster.client.delete(f"{run.root}/alpaca")
    # The garbage collector looks for kinds that were installed after its start every 30 s.
    wait_for("the pods are asked to end", lambda: "deletionTimestamp" in run.pods()[0]["metadata"], 75)
    for pod in run.pods():
        run.node.confirm_deletion(pod)
    wait_for(
        "everything is gone", lambda: not (run.jobs() or run.objects("configmaps") or run.objects("services"))
    )
