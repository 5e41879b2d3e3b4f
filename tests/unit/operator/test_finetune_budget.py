"""What failures and disruptions cost a run, what progress gives back, and how long the next attempt waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.support.attempts import START, Cluster, Loop, spec_of
from tests.support.finetunes import progress_of
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.api.run_policy import RunPolicy
from yuan2_operator.constants import Reason
from yuan2_operator.status.attempts import Ledger, read_ledger, restart_at
from yuan2_operator.status.budget import budget_is_back, fruitless, heard, progressed, restart_delay

HOUR = timedelta(hours=1)


def attempt(number: int, checkpoint: int | None, *, hours: float = 1.0, **more: Any) -> Attempt:
    """One that ended `number` hours after the start."""
    end = START + number * HOUR
    fields = {"outcome": "Failed", "counted": True, "running_time": end - hours * HOUR, **more}
    return Attempt(
        number=number, start_time=end - hours * HOUR, end_time=end, checkpoint_step=checkpoint, **fields
    )


def test_rank_0_is_noted_as_far_as_it_says_more_than_before():
    fresh = Attempt(number=1)
    assert heard(fresh, progress_of("x", step=3)) == {"resumed_from_step": 0, "checkpoint_step": 0}
    known = fresh.model_copy(update={"resumed_from_step": 20, "checkpoint_step": 40})
    assert heard(known, progress_of("x", step=41, resumed_from_step=20, last_checkpoint_step=40)) == {}
    assert heard(known, progress_of("x", step=60, resumed_from_step=20, last_checkpoint_step=60)) == {
        "checkpoint_step": 60
    }
    assert heard(fresh, progress_of("x", step=20, resumed_from_step=20)) == {
        "resumed_from_step": 20,
        "checkpoint_step": 20,
    }


def test_progress_is_a_checkpoint_newer_than_all_before_and_than_the_one_it_began_with():
    assert progressed([attempt(1, 10)])
    assert not progressed([attempt(1, 0)])
    assert not progressed([attempt(1, None)])
    assert not progressed([attempt(1, 10), attempt(2, 10)])
    assert not progressed([attempt(1, 10), attempt(2, None), attempt(3, 10)])
    assert progressed([attempt(1, 10), attempt(2, None), attempt(3, 20)])
    assert not progressed([attempt(1, 10, resumed_from_step=10)]), "what an earlier run left in the output"


def test_an_attempt_that_nobody_can_ask_is_not_said_to_make_no_progress():
    assert not fruitless([attempt(1, None)])
    assert fruitless([attempt(1, None, running_time=None)]), "its pods never ran together"
    assert fruitless([attempt(1, 0)])
    assert not fruitless([attempt(1, 0, reason=Reason.PODS_NOT_TOGETHER)]), "nodes were short"


@pytest.mark.parametrize(
    ("window", "checkpoint", "back"),
    [(3600, 20, True), (3601, 20, False), (3600, 10, False), (0, 20, True), (0, 10, False)],
)
def test_the_budget_is_back_after_the_window_with_a_newer_checkpoint(window, checkpoint, back):
    policy = RunPolicy(restart_window_seconds=window)
    attempts = [attempt(1, 10), attempt(2, checkpoint)]
    assert budget_is_back(attempts, policy, START + 2 * HOUR) is back


def test_progress_of_a_disrupted_attempt_counts_and_that_before_the_failure_does_not():
    policy, disrupted = RunPolicy(), {"outcome": "Disrupted", "counted": False}
    between = [attempt(1, 10), attempt(2, 20, **disrupted), attempt(3, 20)]
    assert budget_is_back(between, policy, START + 3 * HOUR)
    before = [attempt(1, 10, **disrupted), attempt(2, 20), attempt(3, 20)]
    assert not budget_is_back(before, policy, START + 3 * HOUR)
    assert budget_is_back([attempt(9, 10, **disrupted), attempt(10, 20)], policy, START + 10 * HOUR)


def test_every_restart_of_the_default_budget_begins_within_ten_seconds():
    failed = [attempt(number, 0) for number in range(1, 10)]
    waits = [restart_delay(failed[:count]).total_seconds() for count in range(1, 10)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert max(waits[: RunPolicy().max_restarts]) <= 10


def test_only_attempts_in_a_row_that_came_to_nothing_make_the_next_one_wait():
    assert restart_delay([attempt(1, 0), attempt(2, 10)]) == timedelta(0)
    assert restart_delay([attempt(1, 10), attempt(2, 10)]) == timedelta(seconds=2)
    assert restart_delay([attempt(1, None), attempt(2, None)]) == timedelta(0), "long, and nothing is known"
    assert restart_delay([attempt(1, 0), attempt(2, 0, outcome="Suspended")]) == timedelta(0)
    assert restart_at(Ledger(attempts=(attempt(1, 0),), number=1)) == START + HOUR + timedelta(seconds=2)


def trained(**policy: Any) -> tuple[Cluster, Loop]:
    cluster = Cluster()
    return cluster, Loop(cluster, spec_of(runPolicy=policy), checkpoint=0)


def one_more(cluster: Cluster, loop: Loop, *, steps: int, code: int = 1, disruption: str | None = None):
    """An attempt that trains for two hours, completes checkpoints and ends."""
    cluster.now += timedelta(seconds=310)
    loop.reconcile()
    cluster.sync()
    cluster.start(loop.status.attempt)
    loop.reconcile()
    cluster.now += 2 * HOUR
    loop.checkpoint += steps
    loop.reconcile()
    cluster.end((loop.status.attempt, 1), code, disruption)
    for _ in range(3):
        cluster.sync()
        cluster.reap()
        loop.reconcile()


def test_a_long_run_outlives_more_failures_than_its_budget_as_long_as_it_gets_on():
    cluster, loop = trained(maxRestarts=1)
    for _ in range(5):
        one_more(cluster, loop, steps=10)
    assert (loop.status.restarts, loop.status.restarts_used, loop.status.phase) == (5, 1, "Pending")
    one_more(cluster, loop, steps=0)
    ending = read_ledger(loop.status).ending
    assert ending.reason == Reason.TOO_MANY_RESTARTS
    assert "all 1 restarts of spec.runPolicy.maxRestarts are used without progress" in ending.message


def test_disruptions_are_endless_with_progress_and_counted_by_reason():
    cluster, loop = trained(maxDisruptionsWithoutProgress=2)
    for kind in ("PreemptionByScheduler", "EvictionByEvictionAPI", "DeletionByPodGC", None):
        one_more(cluster, loop, steps=10, code=75, disruption=kind)
    for _ in range(2):
        one_more(cluster, loop, steps=0, code=75, disruption="PreemptionByScheduler")
    status = loop.status
    assert status.disruptions == 6
    assert (status.disruptions_without_progress, status.restarts) == (2, 0)
    assert read_ledger(status).ending is None
    one_more(cluster, loop, steps=0, code=75, disruption="PreemptionByScheduler")
    ending = read_ledger(loop.status).ending
    assert (ending.reason, ending.complete) == (Reason.NO_PROGRESS, False)
    assert "as were 2 before it (spec.runPolicy.maxDisruptionsWithoutProgress)" in ending.message


def test_a_status_of_the_release_before_has_used_all_of_its_restarts():
    assert read_ledger(FineTuneStatus(restarts=2)).restarts_used == 2
    assert read_ledger(FineTuneStatus(restarts=2, restarts_used=0)).restarts_used == 0
