"""Nodes that failures point to, how the next attempt avoids them, and how long a run has held its GPUs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.support.attempts import START, Cluster, Loop, spec_of
from yuan2_core.contract import Termination
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.constants import KIND_FINETUNE, Reason
from yuan2_operator.manifests.avoidance import avoiding
from yuan2_operator.manifests.finetune import training_job
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner
from yuan2_operator.status.attempts import Ledger, World
from yuan2_operator.status.budget import NODES_KEPT, blamed, offenders
from yuan2_operator.status.judgement import AttemptView, JobFacts, Judgement, judge
from yuan2_operator.status.pods import PodFacts, Problem
from yuan2_operator.status.usage import with_gpu_hours

FIELDS = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("a", "b")]


def failed(reason: str, **more: Any) -> Judgement:
    facts = PodFacts(
        "x-1-0", 0, 1, "Failed", node="a", exit_code=1, finished=START, problem=Problem(reason, "t")
    )
    view = AttemptView(1, JobFacts("x-1", 1, failing=True), (replace(facts, **more),))
    found = judge(view, Attempt(number=1), START + timedelta(minutes=9))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("reason", "node"), [(Reason.CRASHED, "a"), (Reason.OUT_OF_MEMORY, None), ("OutputFull", None)]
)
def test_only_a_crash_points_to_its_node(reason, node):
    word = Termination(reason=reason, message="t")
    assert failed(reason, termination=word).node == node


def test_a_lost_node_is_named_and_an_evicting_one_is_not():
    assert failed(Reason.NODE_LOST, disruption="DeletionByPodGC").node == "a"
    assert failed(Reason.DRAINED, disruption="EvictionByEvictionAPI").node is None


def test_failures_are_counted_by_node_and_the_second_makes_an_offender():
    failures = blamed(blamed({"b": 1}, "a"), "a")
    assert failures == {"a": 2, "b": 1}
    assert offenders(failures) == ("a",)
    many = {f"n{index:03}": 2 for index in range(NODES_KEPT)}
    kept = blamed(many, "new")
    assert (len(kept), kept["new"]) == (NODES_KEPT, 1)


def test_a_run_remembers_the_nodes_of_its_failures():
    cluster = Cluster()
    loop = Loop(cluster, spec_of())
    for number in (1, 2):
        cluster.now += timedelta(seconds=310)
        loop.reconcile()
        cluster.sync()
        cluster.pods = {key: replace(pod, node=f"n{key[1]}") for key, pod in cluster.pods.items()}
        cluster.start(number)
        loop.reconcile()
        cluster.end((number, 1), 1)
        crashed = cluster.pods[(number, 1)]
        cluster.pods[(number, 1)] = replace(crashed, problem=Problem(Reason.CRASHED, "boom"))
        for _ in range(3):
            cluster.sync()
            cluster.reap()
            loop.reconcile()
    status = loop.status
    assert (status.node_failures, status.nodes) == ({"n1": 2}, ["n0", "n1"])
    assert [attempt.node for attempt in status.attempts[:2]] == ["n1", "n1"]


def test_without_offenders_nothing_is_added():
    template = {"spec": {}}
    assert avoiding(template, (), required=True) is template


def test_a_wish_is_added_to_the_users_own():
    mine = {"weight": 1, "preference": {"matchExpressions": []}}
    rules = {"preferredDuringSchedulingIgnoredDuringExecution": [mine]}
    template = {"spec": {"affinity": {"podAffinity": {}, "nodeAffinity": rules}}}
    affinity = avoiding(template, ("a", "b"), required=False)["spec"]["affinity"]
    wish = {"weight": 100, "preference": {"matchFields": FIELDS}}
    assert affinity == {
        "podAffinity": {},
        "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [mine, wish]},
    }


def test_a_demand_goes_into_each_of_the_users_alternatives():
    terms = [{"matchExpressions": ["x"]}, {"matchFields": ["y"]}]
    rules = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    made = avoiding({"spec": {"affinity": {"nodeAffinity": rules}}}, ("a", "b"), required=True)
    found = made["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert found["nodeSelectorTerms"] == [
        {"matchExpressions": ["x"], "matchFields": FIELDS},
        {"matchFields": ["y", *FIELDS]},
    ]
    alone = avoiding({"spec": {}}, ("a", "b"), required=True)["spec"]["affinity"]["nodeAffinity"]
    assert alone == {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": FIELDS}]}
    }


@pytest.mark.parametrize(
    ("setting", "kinds"), [("Preferred", ["preferred"]), ("Required", ["required"]), ("Never", [])]
)
def test_the_setting_decides(setting, kinds):
    plan = plan_finetune(
        Owner(KIND_FINETUNE, "x", "demo", "uid", 1),
        spec_of(runPolicy={"avoidFailedNodes": setting}),
        attempt=3,
        restarts=2,
        missing=(),
        default_image="t:1",
        avoid=("a", "b"),
    )
    assert isinstance(plan, FineTunePlan)
    affinity = training_job(plan)["spec"]["template"]["spec"].get("affinity", {"nodeAffinity": {}})
    assert [
        kind.removesuffix("DuringSchedulingIgnoredDuringExecution") for kind in affinity["nodeAffinity"]
    ] == kinds


def hours(
    prior: FineTuneStatus, attempts: list[Attempt], seconds: int
) -> tuple[list[float | None], float | None]:
    spec = spec_of(workers={"processesPerWorker": None, "gpusPerWorker": 4})
    ledger = Ledger(attempts=tuple(attempts), number=attempts[-1].number)
    world = World({attempts[-1].number: AttemptView(1, JobFacts("x", 1, pods=2))})
    made, total = with_gpu_hours(spec, prior, ledger, world, START + timedelta(seconds=seconds))
    return [attempt.gpu_hours for attempt in made], total


def test_gpu_hours_are_those_of_all_attempts_from_the_moment_when_all_pods_ran():
    opened = Attempt(number=1, start_time=START, running_time=START)
    assert hours(FineTuneStatus(), [opened], 1800) == ([4.0], 4.0)
    prior = FineTuneStatus(attempts=[opened.model_copy(update={"gpu_hours": 4.0})], gpu_hours=4.0)
    ended = opened.model_copy(
        update={"gpu_hours": 4.0, "outcome": "Failed", "end_time": START + timedelta(hours=1)}
    )
    second = Attempt(number=2, start_time=START + timedelta(hours=1))
    assert hours(prior, [ended, second], 9999) == ([8.0, None], 8.0)
    known = FineTuneStatus(attempts=[ended.model_copy(update={"gpu_hours": 8.0}), second], gpu_hours=8.0)
    runs = second.model_copy(update={"running_time": START + timedelta(hours=2)})
    assert hours(known, [runs], 3 * 3600) == ([8.0], 16.0), "the first is no longer remembered, its hours are"


def test_a_run_on_cpu_has_no_gpu_hours():
    spec, ledger = spec_of(), Ledger(attempts=(Attempt(number=1, running_time=START),), number=1)
    assert with_gpu_hours(spec, FineTuneStatus(), ledger, World(), START) == (list(ledger.attempts), None)
