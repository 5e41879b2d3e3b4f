"""What queues and gang schedulers are told."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from tests.support.attempts import spec_of
from yuan2_operator.api.common import Condition
from yuan2_operator.constants import KIND_FINETUNE
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.scheduling import gives_place_back, workload_name
from yuan2_operator.reconcile.finetune import half_done
from yuan2_operator.status.attempts import Ending, Ledger, World
from yuan2_operator.status.judgement import AttemptView
from yuan2_operator.status.pods import PodFacts

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
OWNER = Owner(KIND_FINETUNE, "alpaca", "demo", "uid-1", 1)


def made(attempt=1, owner=OWNER, **spec):
    plan = plan_finetune(owner, spec_of(**spec), attempt=attempt, restarts=0, missing=(), default_image="x:1")
    assert isinstance(plan, FineTunePlan)
    return {manifest["kind"]: manifest for manifest in finetune_manifests(plan)}


def test_without_a_queue_pods_have_nothing_of_it():
    manifests = made()
    template = manifests["Job"]["spec"]["template"]
    assert "PodGroup" not in manifests
    assert not [key for key in template["metadata"]["labels"] if "kueue" in key]
    assert "annotations" not in template["metadata"]
    assert "schedulerName" not in template["spec"]


def test_all_attempts_are_one_pod_group_of_kueue():
    groups = set()
    for attempt in (1, 2):
        job = made(attempt, scheduling={"queueName": "team", "priorityClass": "urgent"})["Job"]
        metadata = job["spec"]["template"]["metadata"]
        assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "team"
        assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"
        assert metadata["annotations"]["kueue.x-k8s.io/pod-group-total-count"] == "2"
        groups.add(metadata["labels"]["kueue.x-k8s.io/pod-group-name"])
        # With the label on the Job, each attempt would have a Workload of its own.
        assert not [key for key in job["metadata"]["labels"] if "kueue" in key]
        assert job["metadata"]["labels"]
    assert groups == {workload_name(OWNER)}


def test_another_run_of_the_same_name_has_another_group():
    later = Owner(KIND_FINETUNE, "alpaca", "demo", "uid-2", 1)
    assert workload_name(OWNER) != workload_name(later)


@pytest.mark.parametrize(
    ("gang", "version", "scheduler"),
    [
        ("coscheduling", "scheduling.x-k8s.io/v1alpha1", "scheduler-plugins-scheduler"),
        ("volcano", "scheduling.volcano.sh/v1beta1", "volcano"),
    ],
)
def test_a_gang_has_its_group_before_its_job(gang, version, scheduler):
    manifests = made(scheduling={"gang": gang, "queueName": "team"})
    assert list(manifests)[-2:] == ["PodGroup", "Job"]
    group, template = manifests["PodGroup"], manifests["Job"]["spec"]["template"]
    assert (group["apiVersion"], group["spec"]["minMember"]) == (version, 2)
    assert group["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    assert template["spec"]["schedulerName"] == scheduler
    known = {**template["metadata"]["labels"], **template["metadata"].get("annotations", {})}
    assert group["metadata"]["name"] in {
        known.get("scheduling.x-k8s.io/pod-group"),
        known.get("scheduling.k8s.io/group-name"),
    }
    # Volcano has queues of its own.
    assert (group["spec"].get("queue") == "team") == (gang == "volcano")
    assert ("kueue.x-k8s.io/queue-name" in known) == (gang == "coscheduling")


def test_a_scheduler_of_another_name_is_laid_over():
    template = {"spec": {"schedulerName": "mine"}}
    job = made(scheduling={"gang": "coscheduling"}, workers={"podTemplate": template})["Job"]
    assert job["spec"]["template"]["spec"]["schedulerName"] == "mine"


def conditions(**states):
    return [
        Condition(
            type=kind, status=status, reason="R", message="", last_transition_time="2026-01-01T00:00:00Z"
        )
        for kind, status in states.items()
    ]


@pytest.mark.parametrize(
    ("before", "after", "given"),
    [
        ({}, {"Suspended": "True"}, True),
        ({"Suspended": "True"}, {"Suspended": "True"}, False),
        ({"Suspended": "False"}, {"Failed": "True", "Suspended": "False"}, True),
        ({"Failed": "True"}, {"Failed": "True"}, False),
        ({"Suspended": "True"}, {"Suspended": "False"}, False),
        ({}, {"Complete": "True", "Failed": "False"}, False),
    ],
)
def test_the_place_is_given_back_once(before, after, given):
    assert gives_place_back(conditions(**before), conditions(**after)) is given


def view(*codes):
    pods = tuple(
        PodFacts(name=f"x-1-{index}", index=index, attempt=1, phase="Failed", node="a", exit_code=code)
        for index, code in enumerate(codes)
    )
    return World({1: AttemptView(1, None, pods)})


@pytest.mark.parametrize(
    ("codes", "after", "expected"),
    [
        ((0, 1), Ledger(number=1), True),
        ((0, 1), Ledger(number=1).begin(2, NOW), True),
        ((1, 1), Ledger(number=1), False),
        ((0, 1), Ledger(number=0).begin(1, NOW), False),
        ((0, 0), Ledger(number=1, ending=Ending(True, "Succeeded", "")), False),
    ],
)
def test_a_group_begins_anew_when_a_rank_had_ended_well(codes, after, expected):
    assert half_done(Ledger().begin(1, NOW), after, view(*codes)) is expected
