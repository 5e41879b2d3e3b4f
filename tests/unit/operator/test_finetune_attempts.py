"""Single steps of the life of a FineTune: what ends an attempt, what it counts, what follows."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.support.attempts import GRACE, START, Cluster, Loop, spec_of
from yuan2_core.contract import PEER_LOST, PEERS_MISSING, Termination
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.constants import Reason
from yuan2_operator.status.attempts import (
    Ending,
    Ledger,
    World,
    advance,
    deadline_at,
    read_ledger,
    restart_at,
    unwanted,
)
from yuan2_operator.status.judgement import AttemptView, JobFacts, disturbed, judge, read_job
from yuan2_operator.status.pods import LOST_AFTER, PodFacts, Problem


def running(**policy) -> tuple[Cluster, Loop]:
    """A run whose first attempt trains."""
    cluster = Cluster()
    loop = Loop(cluster, spec_of(runPolicy=policy))
    loop.reconcile()
    cluster.sync()
    cluster.start(1)
    cluster.now += timedelta(seconds=100)
    loop.reconcile()
    assert loop.status.phase == "Running"
    return cluster, loop


def settle(cluster: Cluster, loop: Loop) -> FineTuneStatus:
    """Controllers and kubelets do their work, the operator looks twice."""
    for _ in range(3):
        cluster.sync()
        cluster.reap()
        loop.reconcile()
    return loop.status


def last(status: FineTuneStatus) -> Attempt:
    return next(attempt for attempt in reversed(status.attempts) if attempt.outcome is not None)


def test_the_first_attempt_waits_for_acceptance():
    policy = spec_of().run_policy
    ledger = advance(Ledger(), World(), policy, accepted=False, now=START)
    assert ledger == Ledger()
    assert advance(ledger, World(), policy, accepted=True, now=START).number == 1


def test_success_of_every_pod_completes_the_run():
    cluster, loop = running()
    for key in list(cluster.pods):
        cluster.end(key, 0)
    status = settle(cluster, loop)
    assert (status.phase, last(status).outcome) == ("Complete", "Succeeded")
    assert status.model is not None
    assert status.model.fingerprint == "uid-1"


def test_exit_code_78_ends_the_run_while_other_pods_still_run():
    cluster, loop = running()
    cluster.end((1, 1), 78)
    cluster.sync()
    status = loop.reconcile()
    assert (status.phase, status.restarts, last(status).outcome) == ("Failed", 0, "Invalid")
    assert set(cluster.jobs) == {1}


def test_a_crash_is_counted_once_and_the_next_attempt_waits_for_its_pods():
    cluster, loop = running()
    cluster.end((1, 0), 1)
    cluster.sync()
    assert loop.reconcile().attempt == 1
    cluster.reap()
    assert loop.reconcile().attempt == 2
    assert (loop.status.restarts, last(loop.status).counted) == (1, True)


@pytest.mark.parametrize("limit", [0, 2])
def test_the_limit_of_restarts_fails_the_run_and_names_the_cause(limit):
    cluster, loop = running(maxRestarts=limit)
    for attempt in range(1, limit + 2):
        cluster.sync()
        cluster.start(attempt)
        cluster.now += timedelta(seconds=100)
        cluster.end((attempt, 0), 1)
        settle(cluster, loop)
    status = loop.status
    failed = next(c for c in status.conditions if c.type == "Failed")
    assert (failed.status, failed.reason, status.restarts) == ("True", Reason.TOO_MANY_RESTARTS, limit)
    assert f"pod x-{limit + 1}-0 ended with 1" in failed.message
    assert "delete this Yuan2FineTune and create it again" in failed.message


def test_a_crash_beside_a_dead_node_is_that_nodes_fault():
    cluster, loop = running()
    cluster.dead.add((1, 1))
    cluster.end((1, 0), 1)  # it lost its peer
    cluster.sync()
    loop.reconcile()
    assert loop.status.attempt == 1, "pod 1 may still run"
    cluster.now += GRACE + LOST_AFTER + timedelta(seconds=1)
    status = loop.reconcile()
    assert (status.attempt, status.restarts, last(status).outcome) == (2, 0, "Disrupted")
    assert "pod x-1-1" in last(status).message


def test_a_crash_before_a_pod_was_deleted_is_a_crash():
    cluster, loop = running()
    cluster.end((1, 0), 1)
    cluster.now += timedelta(seconds=5)
    cluster.ask((1, 1))
    loop.reconcile()
    status = settle(cluster, loop)
    assert (status.restarts, last(status).outcome) == (1, "Failed")


def test_a_job_deleted_by_somebody_is_a_disruption():
    cluster, loop = running()
    cluster.delete_job(1)
    status = settle(cluster, loop)
    assert (status.attempt, status.restarts, last(status).outcome) == (2, 0, "Disrupted")
    assert status.disruptions == 1


def test_a_stall_deletes_the_job_counts_and_restarts():
    cluster, loop = running(stallTimeoutSeconds=60)
    loop.hangs = True
    loop.reconcile()
    assert cluster.jobs[1].deleting
    loop.hangs = False
    status = settle(cluster, loop)
    assert (status.attempt, status.restarts, last(status).outcome) == (2, 1, "Stalled")
    assert last(status).message.startswith(
        "rank 0 reports no optimizer step for 601 s, more than the 600 s of "
    )


def test_it_is_noted_once_when_all_pods_of_an_attempt_run():
    cluster = Cluster()
    loop = Loop(cluster, spec_of())
    loop.reconcile()
    cluster.sync()
    assert loop.reconcile().attempts[0].running_time is None
    cluster.start(1)
    cluster.now += timedelta(seconds=7)
    assert loop.reconcile().attempts[0].running_time == START + timedelta(seconds=7)
    cluster.now += timedelta(seconds=100)
    assert loop.reconcile().attempts[0].running_time == START + timedelta(seconds=7)


def waiting(seconds: int) -> tuple[Cluster, Loop]:
    """A run one of whose two pods has run for some time while the other waits."""
    cluster = Cluster()
    loop = Loop(cluster, spec_of(runPolicy={"startTimeoutSeconds": 600}))
    loop.reconcile()
    cluster.sync()
    stuck = replace(cluster.pods[(1, 1)], waiting="pod x-1-1 is waiting for the scheduler")
    cluster.start(1)
    cluster.pods[(1, 1)] = stuck
    cluster.now += timedelta(seconds=seconds)
    loop.reconcile()
    return cluster, loop


def test_pods_that_wait_for_others_give_their_nodes_back_uncounted_and_try_again_later():
    cluster, loop = waiting(599)
    assert loop.status.attempts[0].outcome is None
    cluster.now += timedelta(seconds=1)
    loop.reconcile()
    ended = loop.status.attempts[0]
    assert (ended.outcome, ended.reason, ended.counted) == ("Disrupted", Reason.PODS_NOT_TOGETHER, False)
    assert ended.message == (
        "1 of 2 pods waited 600 s (spec.runPolicy.startTimeoutSeconds) for the others and give their nodes "
        "back: pod x-1-1 is waiting for the scheduler"
    )
    assert cluster.jobs[1].deleting
    for _ in range(3):
        cluster.sync()
        cluster.reap()
        loop.reconcile()
    assert (loop.status.attempt, loop.status.restarts) == (1, 0)
    cluster.now += timedelta(seconds=2)
    assert loop.reconcile().attempt == 2


def test_the_trouble_of_the_pod_that_is_missing_is_named():
    cluster, loop = waiting(599)
    cluster.pods[(1, 1)] = replace(cluster.pods[(1, 1)], problem=Problem("ImagePullFailed", "no image"))
    cluster.now += timedelta(seconds=1)
    assert loop.reconcile().attempts[0].message.endswith("give their nodes back: no image")


def test_pods_of_which_none_runs_wait_without_end():
    cluster = Cluster()
    loop = Loop(cluster, spec_of(runPolicy={"startTimeoutSeconds": 600}))
    loop.reconcile()
    cluster.sync()
    cluster.now += timedelta(days=3)
    assert loop.reconcile().attempts[0].outcome is None


def test_a_pod_that_waited_in_vain_for_the_others_did_not_crash():
    word = Termination(reason=PEERS_MISSING, message="the pods did not find each other: timed out")
    found = verdict([pod(0, 1, termination=word)])
    assert (found.outcome, found.reason, found.counted) == ("Disrupted", Reason.PODS_NOT_TOGETHER, False)
    assert found.message == (
        "pod x-1-0 ran, but not all others did: the pods did not find each other: timed out"
    )
    lost = Termination(reason=PEER_LOST, message="lost contact")
    assert not verdict([pod(0, 1, termination=word), pod(1, 1, termination=lost)]).counted


def test_pods_that_all_ran_and_did_not_find_each_other_have_failed():
    word = Termination(reason=PEERS_MISSING, message="the pods did not find each other: timed out")
    view = AttemptView(1, JobFacts("x-1", 1, failing=True), (pod(0, 1, termination=word),))
    found = judge(view, Attempt(number=1, running_time=START), START + timedelta(seconds=60))
    assert (found.outcome, found.counted) == ("Failed", True)


def test_a_crash_beside_pods_that_waited_in_vain_is_a_crash():
    word = Termination(reason=PEERS_MISSING, message="the pods did not find each other: timed out")
    found = verdict([pod(0, 1, termination=word), pod(1, 139)])
    assert (found.outcome, found.counted) == ("Failed", True)


def test_the_image_of_an_attempt_is_noted_once_and_known_of_the_newest():
    cluster = Cluster()
    loop = Loop(cluster, spec_of())
    loop.reconcile()
    cluster.sync()
    cluster.pods = {key: replace(pod, image=f"t:{key[1]}") for key, pod in cluster.pods.items()}
    assert loop.reconcile().attempts[0].image == "t:0"
    cluster.pods = {key: replace(pod, image="t:9") for key, pod in cluster.pods.items()}
    assert loop.reconcile().attempts[0].image == "t:0"
    images = [Attempt(number=1, image="a"), Attempt(number=2, image="b"), Attempt(number=3)]
    assert Ledger(attempts=tuple(images), number=3).image == "b"
    assert Ledger(attempts=(Attempt(number=1),), number=1).image is None


def test_suspension_is_not_counted_and_resets_the_deadline():
    cluster, loop = running(activeDeadlineSeconds=1000)
    begun = loop.status.start_time
    loop.spec = spec_of(runPolicy={"suspend": True, "activeDeadlineSeconds": 1000})
    settle(cluster, loop)
    assert (loop.status.phase, last(loop.status).outcome) == ("Suspended", "Suspended")
    cluster.now += timedelta(seconds=5000)
    assert loop.reconcile().phase == "Suspended"
    loop.spec = spec_of(runPolicy={"activeDeadlineSeconds": 1000})
    status = loop.reconcile()
    assert (status.attempt, status.restarts, status.phase) == (2, 0, "Pending")
    assert status.start_time > begun


def test_the_deadline_runs_over_all_attempts():
    cluster, loop = running(activeDeadlineSeconds=250)
    cluster.end((1, 0), 1)
    settle(cluster, loop)
    cluster.now += timedelta(seconds=200)
    status = loop.reconcile()
    failed = next(c for c in status.conditions if c.type == "Failed")
    assert (failed.status, failed.reason, status.attempt) == ("True", Reason.DEADLINE_EXCEEDED, 2)
    assert cluster.jobs[2].deleting


def test_short_attempts_make_the_next_one_wait_longer_and_longer():
    attempts = []
    for number in range(1, 5):
        attempts.append(
            Attempt(
                number=number, outcome="Disrupted", start_time=START, end_time=START + timedelta(seconds=1)
            )
        )
        waits = restart_at(Ledger(attempts=tuple(attempts), number=number))
        assert waits == START + timedelta(seconds=1 + 2**number)
    long = attempts[-1].model_copy(update={"number": 5, "end_time": START + timedelta(hours=1)})
    assert restart_at(Ledger(attempts=(*attempts, long), number=5)) is None


def test_old_jobs_go_and_the_last_two_stay_for_their_logs():
    done = {
        number: AttemptView(number, JobFacts(f"x-{number}", number, failing=True)) for number in range(1, 5)
    }
    ledger = Ledger(attempts=(Attempt(number=4),), number=4)
    assert unwanted(ledger, World(done)) == [1, 2]


def test_an_invalid_attempt_keeps_its_job_and_so_its_logs():
    attempt = Attempt(number=1, outcome="Invalid")
    seen_before_the_job_controller = World({1: AttemptView(1, JobFacts("x-1", 1))})
    assert unwanted(Ledger(attempts=(attempt,), number=1), seen_before_the_job_controller) == []


def test_a_wiped_status_is_made_anew_from_the_jobs():
    views = {
        3: AttemptView(3, JobFacts("x-3", 3, created=START, failing=True, restarts=1)),
        4: AttemptView(4, JobFacts("x-4", 4, created=START, restarts=2)),
    }
    ledger = advance(
        read_ledger(FineTuneStatus()), World(views), spec_of().run_policy, accepted=True, now=START
    )
    assert (ledger.number, ledger.restarts) == (4, 2)
    assert ledger.open is not None


@pytest.mark.parametrize(
    ("outcome", "complete"), [("Succeeded", True), ("Invalid", False), ("DeadlineExceeded", False)]
)
def test_an_end_stays_an_end_when_somebody_takes_its_condition_away(outcome, complete):
    attempt = Attempt(number=2, outcome=outcome, reason="R", message="words")
    ledger = read_ledger(FineTuneStatus(attempts=[attempt], attempt=2))
    assert ledger.ending == Ending(complete, "R", "words")
    assert advance(ledger, World(), spec_of().run_policy, accepted=True, now=START) == ledger


@pytest.mark.parametrize("outcome", ["Failed", "Disrupted", "Stalled", "Suspended", None])
def test_no_other_outcome_ends_a_run(outcome):
    assert (
        read_ledger(FineTuneStatus(attempts=[Attempt(number=1, outcome=outcome)], attempt=1)).ending is None
    )


def test_the_deadline_is_one_moment_for_all():
    policy = spec_of(runPolicy={"activeDeadlineSeconds": 100}).run_policy
    resting = policy.model_copy(update={"suspend": True})
    opened = Ledger(attempts=(Attempt(number=1, start_time=START),), number=1, started=START)
    failed = Ledger(attempts=(Attempt(number=1, outcome="Failed"),), number=1, started=START)
    suspended = Ledger(attempts=(Attempt(number=1, outcome="Suspended"),), number=1, started=START)
    at = START + timedelta(seconds=100)
    assert deadline_at(opened, policy) == deadline_at(opened, resting) == deadline_at(failed, policy) == at
    assert deadline_at(failed, resting) is None
    assert deadline_at(suspended, policy) is None
    assert deadline_at(Ledger(), policy) is None
    assert deadline_at(opened, spec_of().run_policy) is None


def test_pods_of_an_earlier_run_of_the_same_name_are_waited_for():
    world = World(foreign=True)
    ledger = advance(Ledger(), world, spec_of().run_policy, accepted=True, now=START)
    assert ledger.number == 0


def pod(index: int, code: int, seconds: int = 0, **more) -> PodFacts:
    facts = PodFacts(
        f"x-1-{index}", index, 1, "Failed", exit_code=code, finished=START + timedelta(seconds=seconds)
    )
    return replace(facts, problem=Problem(Reason.CRASHED, f"pod x-1-{index} ended with {code}"), **more)


def verdict(pods: list[PodFacts], failure: str = "Job has reached the specified backoff limit"):
    view = AttemptView(1, JobFacts("x-1", 1, failing=True, failure=failure), tuple(pods))
    return judge(view, Attempt(number=1), START + timedelta(seconds=60))


def test_a_run_that_ended_early_says_so_in_the_words_of_rank_0():
    text = "ended early after 300 of 900 steps: no lower evaluation loss since step 120"
    ended = PodFacts("x-1-0", 0, 1, "Succeeded", termination=Termination(reason="Complete", message=text))
    done = AttemptView(1, JobFacts("x-1", 1, complete=True), (ended,))
    found, silent = (
        judge(view, Attempt(number=1), START)
        for view in (done, replace(done, pods=(replace(ended, termination=None),)))
    )
    assert (found.outcome, found.message) == ("Succeeded", text)
    assert silent.message == "attempt 1 trained to the end"


def test_the_first_pod_that_crashed_is_the_cause():
    found = verdict([pod(0, 1, seconds=9), pod(1, 137, seconds=3)])
    assert (found.outcome, found.counted) == ("Failed", True)
    assert "x-1-1" in found.message


LOST_PEER = Termination(reason=PEER_LOST, message="lost contact with another rank")
KILLED_RANK = Termination(reason="Crashed", message="rank 1 was ended by signal 9")
ASKED = START + timedelta(seconds=4)
BEING_DELETED = {"deletion_requested": ASKED, "delete_by": ASKED + GRACE}


@pytest.mark.parametrize("code", [1, 137])
@pytest.mark.parametrize("word", [KILLED_RANK, None])
@pytest.mark.parametrize("seconds", [3, 9])
def test_a_pod_that_lost_its_peer_is_not_the_cause_even_if_it_ended_first(code, word, seconds):
    found = verdict([pod(0, 1, seconds=3, termination=LOST_PEER), pod(1, code, seconds, termination=word)])
    assert "x-1-1" in found.message
    assert (found.outcome, found.counted) == ("Failed", True)


@pytest.mark.parametrize(("code", "word"), [(1, KILLED_RANK), (137, None)])
def test_the_cause_is_named_although_the_job_was_ending_it_already(code, word):
    culprit = pod(1, code, seconds=5, termination=word, **BEING_DELETED)
    assert "x-1-1" in verdict([pod(0, 1, seconds=3, termination=LOST_PEER), culprit]).message


@pytest.mark.parametrize(("code", "word", "seconds"), [(143, None, 5), (137, None, 34), (1, LOST_PEER, 5)])
def test_a_pod_that_only_obeyed_the_job_is_not_the_cause(code, word, seconds):
    ended = pod(1, code, seconds=seconds, termination=word, **BEING_DELETED)
    assert "x-1-0" in verdict([pod(0, 1, seconds=3, termination=LOST_PEER), ended]).message


def test_of_pods_that_all_lost_a_peer_the_first_is_named():
    lost = [pod(0, 1, seconds=9, termination=LOST_PEER), pod(1, 1, seconds=3, termination=LOST_PEER)]
    assert "x-1-1" in verdict(lost).message


def test_a_preempted_pod_outweighs_the_crash_of_its_peer():
    found = verdict([pod(0, 1), pod(1, 75, seconds=3, disruption="PreemptionByScheduler")])
    assert (found.outcome, found.counted) == ("Disrupted", False)


@pytest.mark.parametrize(("evicted", "reason"), [(True, Reason.DRAINED), (False, Reason.DISRUPTED)])
def test_who_deleted_a_pod_is_noted_while_its_condition_can_be_read(evicted, reason):
    facts = PodFacts("x-1-0", 0, 1, "Running", running=True, deletion_requested=START)
    if evicted:
        problem = Problem(Reason.DRAINED, "pod x-1-0 was evicted")
        facts = replace(facts, disruption="EvictionByEvictionAPI", problem=problem)
    cause = disturbed(AttemptView(1, JobFacts("x-1", 1), (facts,)))
    assert cause is not None
    assert (cause.reason, cause.at) == (reason, START)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("Container pytorch for pod demo/x-1-0 failed with exit code 75 matching FailJob", Reason.TERMINATED),
        ("Pod demo/x-1-1 has condition DisruptionTarget matching FailJob rule", Reason.DISRUPTED),
    ],
)
def test_the_reason_of_a_disruption_says_what_kind_it_was(failure, reason):
    assert verdict([pod(0, 75)], failure).reason == reason
    lost = replace(pod(1, 0), phase="Running", delete_by=START - LOST_AFTER)
    assert verdict([pod(0, 1), lost], failure).reason == Reason.NODE_LOST


def test_the_jobs_own_words_are_enough_when_the_pod_is_gone():
    said = "Pod demo/x-1-1 has condition DisruptionTarget matching FailJob rule at index 1"
    found = verdict([pod(0, 1)], said)
    assert found.outcome == "Disrupted"
    assert "pod x-1-1 was preempted" in found.message


def test_a_pod_that_obeyed_sigterm_is_no_failure():
    said = "Container pytorch for pod demo/x-1-0 failed with exit code 75 matching FailJob rule at index 2"
    assert verdict([pod(0, 75), pod(1, 1)], said).outcome == "Disrupted"


def test_a_job_that_failed_without_a_pod_to_blame_is_counted():
    lost = pod(0, 1, **BEING_DELETED)
    found = verdict([replace(lost, problem=None, deletion_requested=None)])
    assert (found.outcome, found.reason, found.counted) == ("Failed", Reason.CRASHED, True)
    assert found.message == "Job x-1 failed: Job has reached the specified backoff limit"


def test_a_job_that_is_gone_was_deleted_by_somebody_else():
    found = judge(AttemptView(3), Attempt(number=3), START)
    assert found is not None
    assert (found.outcome, found.message) == ("Disrupted", "Job 3 of the run was deleted by somebody else")


def test_the_jobs_own_words_about_invalid_input_are_enough():
    said = "Container pytorch for pod demo/x-1-0 failed with exit code 78 matching FailJob rule at index 1"
    found = verdict([], said)
    assert (found.outcome, found.reason, found.message) == ("Invalid", Reason.INVALID_SPEC, said)


def test_who_deleted_a_pod_after_a_crash_did_not_disturb():
    well, broken = pod(0, 0), pod(1, 1, seconds=3)
    asked = replace(well, phase="Running", finished=None, deletion_requested=START + timedelta(seconds=30))
    view = AttemptView(1, JobFacts("x-1", 1), (asked, broken))
    assert disturbed(view) is None
    alone = disturbed(AttemptView(1, JobFacts("x-1", 1), (asked,)))
    assert alone is not None
    assert alone.at == asked.deletion_requested


def test_a_job_is_read_as_failing_before_its_pods_have_ended():
    job = {
        "spec": {"parallelism": 4},
        "metadata": {
            "name": "x-7",
            "deletionTimestamp": "2026-01-01T00:00:30Z",
            "labels": {"yuan2.dev/attempt": "7"},
            "annotations": {"yuan2.dev/restarts": "2", "yuan2.dev/config": "x-7-abc"},
        },
        "status": {"conditions": [{"type": "FailureTarget", "status": "True", "message": "why"}]},
    }
    facts = read_job(job)
    assert (facts.attempt, facts.restarts, facts.failing, facts.failure) == (7, 2, True, "why")
    assert facts.config == "x-7-abc"
    assert (facts.pods, facts.deleting) == (4, True)
    assert facts.finishing
    assert not facts.complete
    ended = [{"type": "Failed", "status": "True", "message": "limit"}]
    other = read_job({"metadata": {"name": "x-8"}, "status": {"conditions": ended}})
    assert (other.failing, other.failure, other.restarts) == (True, "limit", 0)
