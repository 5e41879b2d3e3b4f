"""What the pods of a Yuan2Service say becomes conditions."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.services import NOW, OWNER, deployment, ended, finetune_of, plan_of, pod, spec_of
from yuan2_operator.api.service import ServiceStatus
from yuan2_operator.plan.references import Rejection
from yuan2_operator.status.conditions import find_condition
from yuan2_operator.status.service import ServiceObservation, is_ready, service_status

PARTS = ("controller", "worker", "api")
REJECTION = Rejection("FineTuneNotComplete", "Yuan2FineTune tuned is Running")
NOTHING = ServiceObservation({}, [])


def observe(plan, pods=None, **changed) -> ServiceObservation:
    """All deployments rolled out, except for those in `changed`."""
    made = {f"alpaca-{part}": deployment(plan, part) for part in PARTS}
    made.update({f"alpaca-{part}": value for part, value in changed.items()})
    return ServiceObservation(made, [pod(part) for part in PARTS] if pods is None else pods)


def status_of(plan=None, observation=None, prior=None, now=NOW, decision=None):
    plan = plan or plan_of()
    return service_status(
        OWNER,
        plan.spec,
        decision or plan,
        observation or observe(plan),
        prior or ServiceStatus(),
        now=now,
    )


def read(status, kind):
    condition = find_condition(status.conditions, kind)
    assert condition is not None
    return condition.status, condition.reason


def message(status, kind):
    condition = find_condition(status.conditions, kind)
    assert condition is not None
    return condition.message


def test_a_service_that_answers_is_ready_and_says_where():
    status = status_of()
    assert read(status, "Accepted") == ("True", "Valid")
    assert read(status, "Ready") == ("True", "Ready")
    assert read(status, "Progressing") == ("False", "RolledOut")
    assert read(status, "Degraded") == ("False", "Healthy")
    assert (status.phase, status.workers, status.url) == (
        "Ready",
        "1/1",
        "http://alpaca-api.demo.svc:8505/v1",
    )
    assert status.observed_generation == OWNER.generation
    assert is_ready(status)


def test_the_scale_subresource_finds_its_numbers():
    plan = plan_of(spec_of(worker={"replicas": 3}))
    status = status_of(plan, observe(plan, worker=deployment(plan, "worker", ready=2)))
    assert (status.worker_replicas, status.ready_workers, status.workers) == (3, 2, "2/3")
    assert status.selector == "yuan2.dev/component=worker,yuan2.dev/service=alpaca"


def test_before_anything_exists_it_progresses():
    status = status_of(observation=NOTHING)
    assert read(status, "Ready") == ("False", "Starting")
    assert read(status, "Progressing") == ("True", "RollingOut")
    assert read(status, "Degraded") == ("False", "Healthy")
    assert (status.phase, status.workers) == ("Progressing", "0/1")


@pytest.mark.parametrize("part", PARTS)
def test_it_is_not_ready_without_each_of_its_parts(part):
    plan = plan_of()
    status = status_of(plan, observe(plan, **{part: deployment(plan, part, ready=0)}))
    assert read(status, "Ready") == ("False", "Starting")
    assert f"0 of 1 {part} pods are ready" in message(status, "Ready")


def test_an_api_pod_that_has_only_just_become_ready_cannot_be_reached_yet():
    plan = plan_of()
    status = status_of(plan, observe(plan, api=deployment(plan, "api", ready=1, available=0)))
    assert read(status, "Ready") == ("False", "Starting")
    assert message(status, "Ready") == (
        "1 of 1 api pods are ready, 1 of them only just: nodes are told of its address"
    )
    assert read(status, "Progressing") == ("True", "RollingOut")
    assert read(status, "Degraded") == ("False", "Healthy")
    assert status.phase == "Progressing"


def test_one_of_two_api_pods_that_can_be_reached_is_enough_to_answer():
    plan = plan_of(spec_of(api={"replicas": 2}))
    status = status_of(plan, observe(plan, api=deployment(plan, "api", ready=2, available=1)))
    assert read(status, "Ready") == ("True", "Ready")
    assert read(status, "Progressing") == ("True", "RollingOut")


def test_an_api_pod_that_flaps_stays_degraded():
    plan = plan_of()
    late = {"type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "has timed out"}
    made = deployment(plan, "api", ready=1, available=0, conditions=[late])
    assert read(status_of(plan, observe(plan, api=made)), "Degraded") == ("True", "PodsMissing")


def test_one_of_two_workers_is_enough_to_answer():
    plan = plan_of(spec_of(worker={"replicas": 2}))
    status = status_of(plan, observe(plan, worker=deployment(plan, "worker", ready=1)))
    assert read(status, "Ready") == ("True", "Ready")
    assert read(status, "Progressing") == ("True", "RollingOut")


def test_scaled_to_zero_says_how_to_wake_it():
    plan = plan_of(spec_of(worker={"replicas": 0}))
    status = status_of(plan)
    assert read(status, "Ready") == ("False", "ScaledToZero")
    assert "kubectl scale y2svc/alpaca --replicas=1" in message(status, "Ready")


def test_a_worker_that_ends_names_the_pod_and_passes_its_own_words_on():
    plan = plan_of()
    said = json.dumps(
        {"reason": "InvalidModel", "message": "lm_head.weight is missing from model.safetensors"}
    )
    broken = pod("worker", **ended("worker", 78, message=said))
    status = status_of(plan, observe(plan, [broken], worker=deployment(plan, "worker", ready=0)))
    assert read(status, "Ready") == ("False", "InvalidModel")
    assert read(status, "Degraded") == ("True", "InvalidModel")
    assert status.phase == "Degraded"
    assert "pod alpaca-worker-abc ended with exit code 78" in message(status, "Degraded")
    assert "lm_head.weight is missing" in message(status, "Degraded")


def test_a_crash_is_shown_while_the_container_runs_again():
    plan = plan_of()
    running = ended("worker", 1, message="boom")
    running["containerStatuses"][0]["state"] = {"running": {}}
    shown = observe(plan, [pod("worker", **running)], worker=deployment(plan, "worker", ready=0))
    assert read(status_of(plan, shown), "Degraded") == ("True", "Crashed")


def test_a_container_that_is_ready_again_is_healthy():
    plan = plan_of()
    recovered = ended("worker", 1)
    recovered["containerStatuses"][0].update(state={"running": {}}, ready=True)
    assert read(status_of(plan, observe(plan, [pod("worker", **recovered)])), "Degraded") == (
        "False",
        "Healthy",
    )


def test_a_pod_that_fits_no_node_is_degraded_and_not_ready():
    plan = plan_of()
    reason = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
    }
    pending = pod("worker", phase="Pending", conditions=[reason], containerStatuses=[])
    pending["spec"].pop("nodeName")
    status = status_of(plan, observe(plan, [pending], worker=deployment(plan, "worker", ready=0)))
    assert read(status, "Ready") == ("False", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in message(status, "Ready")


def test_an_ended_pod_that_was_replaced_is_forgotten():
    plan = plan_of()
    evicted = pod("worker", phase="Failed", reason="Evicted", message="low on memory")
    status = status_of(plan, observe(plan, [evicted, pod("worker")]))
    assert read(status, "Degraded") == ("False", "Healthy")


def test_pods_that_are_being_deleted_do_not_count():
    plan = plan_of()
    leaving = pod("worker", **ended("worker", 1))
    leaving["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    status = status_of(plan, observe(plan, [leaving], worker=deployment(plan, "worker", ready=0)))
    assert read(status, "Degraded") == ("False", "Healthy")


def test_pods_that_cannot_be_created_are_degraded():
    plan = plan_of()
    refused = {"type": "ReplicaFailure", "status": "True", "message": 'pods "x" is forbidden: exceeded quota'}
    made = deployment(plan, "worker", ready=0, replicas=0, updatedReplicas=0, conditions=[refused])
    status = status_of(plan, observe(plan, [], worker=made))
    assert read(status, "Degraded") == ("True", "PodsMissing")
    assert "exceeded quota" in message(status, "Degraded")


def test_a_deployment_that_is_not_yet_the_planned_one_progresses():
    spec = spec_of(model={"name": "yuan2", "fineTuneRef": {"name": "tuned"}})
    again = {"claimName": "outputs", "path": "alpaca/model", "fingerprint": "run-2"}
    before, after = plan_of(spec, finetune=finetune_of()), plan_of(spec, finetune=finetune_of(model=again))
    status = status_of(after, observe(before))
    assert read(status, "Progressing") == ("True", "RollingOut")
    assert read(status, "Ready") == ("True", "Ready")


def test_a_deployment_whose_controller_has_not_seen_the_change_progresses():
    plan = plan_of()
    stale = deployment(plan, "worker")
    stale["metadata"]["generation"] = 2
    assert read(status_of(plan, observe(plan, worker=stale)), "Progressing") == ("True", "RollingOut")


def test_a_rejection_is_the_reason_of_not_being_ready():
    status = status_of(decision=REJECTION, observation=NOTHING)
    assert read(status, "Accepted") == ("False", "FineTuneNotComplete")
    assert read(status, "Ready") == ("False", "NotAccepted")
    assert message(status, "Ready") == REJECTION.message
    assert (status.phase, status.url) == ("Pending", None)


def test_what_answers_is_ready_though_a_secret_is_missing_now():
    status = status_of(decision=REJECTION, observation=observe(plan_of()))
    assert read(status, "Accepted")[0] == "False"
    assert read(status, "Ready") == ("True", "Ready")
    assert message(status, "Ready").endswith(f"as it was before: {REJECTION.message}")


def test_a_rejection_keeps_what_was_served_before():
    before = status_of()
    assert before.model == plan_of().model
    after = status_of(decision=REJECTION, prior=before)
    assert (after.url, after.model) == (before.url, before.model)


# --- properties --------------------------------------------------------------------------------

counts = st.integers(min_value=0, max_value=3)
pods = st.lists(
    st.builds(
        pod,
        st.sampled_from(PARTS),
        phase=st.sampled_from(["Pending", "Running", "Failed", "Succeeded"]),
    )
    | st.builds(
        lambda part, code: pod(part, **ended(part, code)), st.sampled_from(PARTS), st.integers(1, 255)
    ),
    max_size=4,
)
observations = st.builds(
    lambda ready, there, pods: observe(
        plan_of(),
        pods,
        **{
            part: deployment(plan_of(), part, ready=max(ready[part]), available=min(ready[part]))
            for part in there
        },
    ),
    st.fixed_dictionaries(dict.fromkeys(PARTS, st.tuples(counts, counts))),
    st.sets(st.sampled_from(PARTS)),
    pods,
)
decisions = st.sampled_from([plan_of(), REJECTION])


@given(decisions, observations)
@settings(max_examples=150, deadline=None)
def test_ready_implies_that_every_part_is_available(decision, observation):
    status = status_of(decision=decision, observation=observation)
    found = [observation.deployments.get(f"alpaca-{part}", {}) for part in PARTS]
    available = [made.get("status", {}).get("availableReplicas") for made in found]
    assert read(status, "Ready")[0] != "True" or all(available)
    assert (status.phase == "Ready") <= is_ready(status)


@given(decisions, observations)
@settings(max_examples=150, deadline=None)
def test_the_same_observation_again_changes_nothing(decision, observation):
    first = status_of(decision=decision, observation=observation)
    later = status_of(decision=decision, observation=observation, prior=first, now=NOW + timedelta(hours=1))
    assert later == first


@given(decisions, observations)
@settings(max_examples=100, deadline=None)
def test_what_is_written_reads_back_equal(decision, observation):
    status = status_of(decision=decision, observation=observation)
    assert ServiceStatus.model_validate(status.to_api()) == status


@given(st.lists(st.tuples(decisions, observations), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_a_transition_time_moves_exactly_when_the_status_does(history):
    status = ServiceStatus()
    for hour, (decision, observation) in enumerate(history):
        now = NOW + timedelta(hours=hour)
        after = status_of(decision=decision, observation=observation, prior=status, now=now)
        for condition in after.conditions:
            before = find_condition(status.conditions, condition.type)
            moved = before is None or before.status != condition.status
            assert (condition.last_transition_time == now) == moved
        status = after
