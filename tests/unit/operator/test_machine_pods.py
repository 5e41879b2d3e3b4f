"""What is wrong with a pod, in a sentence: the pod, the cause, the way out."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from tests.support.finetunes import merged
from yuan2_core.contract import Termination
from yuan2_operator.constants import Reason
from yuan2_operator.status.pods import (
    LOST_AFTER,
    Problem,
    diagnose,
    first_problem,
    parse_termination,
    parse_time,
    read_pod,
    requested,
    shorten,
    starting,
)

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
POD: dict[str, Any] = {
    "metadata": {
        "name": "alpaca-1-1",
        "labels": {"yuan2.dev/attempt": "1", "batch.kubernetes.io/job-completion-index": "1"},
        "creationTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {
        "nodeName": "node-a",
        "containers": [
            {"name": "pytorch", "resources": {"limits": {"nvidia.com/gpu": "8", "memory": "64Gi"}}}
        ],
    },
    "status": {"phase": "Pending"},
}


def pod(**changes: Any) -> dict[str, Any]:
    return merged(POD, changes)


def with_state(state: dict[str, Any], phase: str = "Pending", **status: Any) -> dict[str, Any]:
    entry = {"name": "pytorch", "image": "yuan2/train:1", "state": state, **status.pop("entry", {})}
    return pod(status={"phase": phase, "containerStatuses": [entry], **status})


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    return with_state(
        {"terminated": {"exitCode": code, "message": message, "reason": reason}},
        "Failed" if code else "Succeeded",
    )


def condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": status, "reason": reason, "message": message}]}


def test_a_pod_that_fits_no_node():
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."
    found = diagnose(
        pod(spec={"nodeName": None}, status=condition("PodScheduled", "False", "Unschedulable", message))
    )
    assert found is not None
    assert found.reason == Reason.UNSCHEDULABLE
    assert found.message == (
        "pod alpaca-1-1 wants 8 nvidia.com/gpu, 64Gi memory and fits no node: 0/3 nodes are available: "
        "3 Insufficient nvidia.com/gpu; ask for less, loosen nodeSelector, affinity or tolerations, "
        "or add nodes that fit"
    )


WAITING = {
    "containers": [{"name": "pytorch", "image": "yuan2/train:1"}],
    "volumes": [
        {"name": "shm", "emptyDir": {}},
        {"name": "a", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "b", "persistentVolumeClaim": {"claimName": "models"}},
    ],
}


def test_a_pod_that_waits_for_a_claim_names_it():
    message = "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: none."
    status = condition("PodScheduled", "False", "Unschedulable", message)
    found = diagnose(pod(spec={"nodeName": None, **WAITING}, status=status))
    assert found is not None
    assert found.message == (
        "pod alpaca-1-1 waits for its volumes (claim data, models): 0/3 nodes are available: pod has unbound "
        "immediate PersistentVolumeClaims; `kubectl describe pvc` says what a claim lacks"
    )


def test_a_pod_that_a_queue_holds_back():
    found = diagnose(
        pod(spec={"nodeName": None}, status=condition("PodScheduled", "False", "SchedulingGated", "gated"))
    )
    assert found is not None
    assert "scheduling gate" in found.message


def test_an_image_that_cannot_be_pulled():
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    found = diagnose(with_state(waiting))
    assert found is not None
    assert found.reason == Reason.IMAGE_PULL_FAILED
    assert "pod alpaca-1-1 cannot pull image yuan2/train:1" in found.message


def test_a_container_that_cannot_be_created():
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}}
    found = diagnose(with_state(waiting))
    assert found is not None
    assert (found.reason, 'secret "x" not found' in found.message) == (Reason.CONTAINER_CONFIG_ERROR, True)


def test_a_container_that_outgrew_its_memory():
    found = diagnose(ended(137, reason="OOMKilled"))
    assert found is not None
    assert found.reason == Reason.OUT_OF_MEMORY
    assert "memory limit of 64Gi; raise resources.limits.memory" in found.message


def test_what_the_trainer_left_is_told():
    left = Termination(reason="InvalidData", message="file a.json, record 3, field value: empty; remove it")
    found = diagnose(ended(78, left.to_json()))
    assert found == Problem(
        "InvalidData",
        "pod alpaca-1-1 ended with exit code 78: file a.json, record 3, field value: empty; remove it",
    )


def test_who_was_killed_is_said_without_the_end_of_its_log():
    found = diagnose(ended(137, "grad norm 0.132 0.10 s 16:52:34 rank 0: step 273/336 loss"))
    assert found is not None
    assert (found.reason, found.message) == (
        Reason.CRASHED,
        "pod alpaca-1-1 was ended by SIGKILL: its node ran out of memory, or somebody killed its main "
        "process or deleted it without grace; read `kubectl logs alpaca-1-1`",
    )


def test_a_word_of_its_own_outweighs_the_signal():
    word = Termination(reason="Crashed", message="rank 1 was ended by signal 9").to_json()
    text = "pod alpaca-1-1 ended with exit code 137: rank 1 was ended by signal 9"
    assert diagnose(ended(137, word)).message == text


@pytest.mark.parametrize(
    ("code", "message", "text"),
    [
        (139, "step 7", "ended by SIGSEGV: a library crashed in native code; read `kubectl logs alpaca-1-1`"),
        (143, "", "exit code 143 (SIGTERM): read `kubectl logs alpaca-1-1`"),
        (1, "Traceback\n  boom\n", "exit code 1: Traceback boom"),
        (75, "", "was asked to stop (SIGTERM)"),
    ],
)
def test_other_ends(code, message, text):
    found = diagnose(ended(code, message))
    assert found is not None
    assert text in found.message


def test_a_container_that_keeps_crashing_tells_its_last_end():
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {
        "lastState": {
            "terminated": {"exitCode": 78, "message": '{"reason":"InvalidModel","message":"no tensor"}'}
        }
    }
    found = diagnose(with_state(state, entry=last))
    assert found is not None
    assert (found.reason, "no tensor" in found.message) == ("InvalidModel", True)
    silent = diagnose(with_state(state))
    assert silent is not None
    assert silent.reason == Reason.CRASH_LOOP


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("PreemptionByScheduler", "was preempted by a pod of higher priority"),
        ("EvictionByEvictionAPI", "was evicted through the API"),
        ("DeletionByTaintManager", "does not answer"),
        ("SomethingNew", "was disrupted (SomethingNew)"),
    ],
)
def test_disruptions_are_named(reason, text):
    seen = pod(status=condition("DisruptionTarget", "True", reason))
    found = diagnose(seen)
    assert found is not None
    assert text in found.message
    assert read_pod(seen).disruption == reason


def test_a_disruption_is_told_with_its_detail():
    seen = pod(status=condition("DisruptionTarget", "True", "PreemptionByScheduler", "by pod urgent"))
    found = diagnose(seen)
    assert found is not None
    assert found.message.endswith(": by pod urgent")


def test_a_node_that_was_lost_says_so_by_its_reason_alone():
    seen = pod(status={"phase": "Failed", "reason": "NodeLost", "message": "node unresponsive"})
    assert read_pod(seen).disruption == "NodeLost"
    found = diagnose(seen)
    assert found is not None
    assert found.reason == Reason.NODE_LOST


def test_a_pod_that_failed_without_a_message_names_its_reason():
    found = diagnose(pod(status={"phase": "Failed", "reason": "UnexpectedAdmissionError"}))
    assert found is not None
    assert found.message == "pod alpaca-1-1 failed: UnexpectedAdmissionError"


def test_the_trouble_of_an_init_container_is_the_pods():
    entry = {"name": "mesh", "image": "mesh:1", "state": {"waiting": {"reason": "ErrImagePull"}}}
    found = diagnose(pod(status={"initContainerStatuses": [entry]}))
    assert found is not None
    assert found.message.startswith("pod alpaca-1-1 cannot pull image mesh:1")


def test_an_eviction_for_its_own_excess_is_no_disruption():
    seen = pod(
        status={"phase": "Failed", "reason": "Evicted", "message": "ephemeral storage exceeds the limit"}
    )
    found = diagnose(seen)
    assert found is not None
    assert (found.reason, read_pod(seen).disruption) == (Reason.EVICTED, None)
    assert "ephemeral storage" in found.message


def test_a_pod_without_a_problem_has_none():
    assert diagnose(pod()) is None
    assert diagnose(with_state({"running": {}}, "Running")) is None
    assert diagnose(ended(0)) is None


def test_what_a_pod_waits_for():
    assert starting(pod(spec={"nodeName": None})) == "pod alpaca-1-1 is waiting for the scheduler"
    created = "pod alpaca-1-1 is being created on node node-a: "
    assert starting(pod()) == created + "its volumes are mounted, its image is pulled"
    assert (
        starting(pod(spec=WAITING))
        == created + "claim data, models is mounted, image yuan2/train:1 is pulled"
    )
    for sandbox, text in (
        ("False", "claim data, models is mounted"),
        ("True", "image yuan2/train:1 is pulled"),
    ):
        seen = pod(spec=WAITING, status=condition("PodReadyToStartContainers", sandbox))
        assert starting(seen) == created + text
    assert starting(with_state({"running": {}}, "Running")) is None


def test_facts_of_a_running_pod():
    seen = with_state({"running": {"startedAt": "2026-01-01T00:00:07Z"}}, "Running", podIP="10.0.0.1")
    facts = read_pod(seen)
    assert (facts.index, facts.attempt, facts.running, facts.ip) == (1, 1, True, "10.0.0.1")
    assert facts.started == NOW + timedelta(seconds=7)
    assert not facts.terminal
    assert facts.created == NOW
    over = {"terminated": {"exitCode": 0, "startedAt": "2026-01-01T00:00:09Z"}}
    assert read_pod(with_state(over, "Succeeded")).started == NOW + timedelta(seconds=9)


def test_a_pod_far_past_its_deletion_deadline_is_lost():
    deleted = {"deletionTimestamp": "2026-01-01T00:00:30Z", "deletionGracePeriodSeconds": 30}
    facts = read_pod(merged(with_state({"running": {}}, "Running"), {"metadata": deleted}))
    assert facts.deletion_requested == NOW
    assert not facts.lost(NOW + timedelta(seconds=31))
    assert facts.lost(NOW + timedelta(seconds=31) + LOST_AFTER)


def test_the_gravest_problem_is_shown():
    facts = [read_pod(ended(1, "boom")), read_pod(with_state({"waiting": {"reason": "ErrImagePull"}}))]
    found = first_problem(facts)
    assert found is not None
    assert found.reason == Reason.IMAGE_PULL_FAILED
    assert first_problem([]) is None


def test_what_several_containers_ask_for_is_summed_up_in_words():
    two = [{"resources": {"requests": {"cpu": "1"}}}, {"resources": {"requests": {"cpu": "500m"}}}]
    assert requested({"spec": {"containers": two}}) == "1 + 500m cpu"


def test_foreign_texts_are_cut_and_kept_on_one_line():
    assert shorten("a\n  b.") == "a b"
    assert len(shorten("x" * 9999)) == 600


@pytest.mark.parametrize("text", [None, "", "plain", "{", '{"reason": 3}'])
def test_only_our_own_termination_messages_are_parsed(text):
    assert parse_termination(text) is None


def test_times_of_the_api():
    assert parse_time("2026-01-01T00:00:00Z") == NOW
    assert parse_time("2026-01-01T00:00:00.000000Z") == NOW
    assert parse_time(None) is None
