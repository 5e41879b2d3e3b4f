"""The state machine of a FineTune under random histories: what must hold whatever happens."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.attempts import Cluster, Loop, spec_of
from yuan2_core.contract import EXIT_COMPLETE, EXIT_CRASHED, EXIT_INVALID, EXIT_PREEMPTED
from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.constants import Reason
from yuan2_operator.status.attempts import read_ledger

index = st.integers(min_value=0, max_value=1)


class FineTuneLife(RuleBasedStateMachine):
    """Pods crash, vanish, are evicted or hang; the operator is slow, restarts and loses writes."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.disturbances = 0
        self.restarts = 0
        self.ending = None
        self.invalid_at: int | None = None

    @initialize(
        max_restarts=st.integers(min_value=0, max_value=3),
        window=st.sampled_from([0, 600]),
        idle=st.sampled_from([0, 2, 20]),
        heard=st.booleans(),
    )
    def begin(self, max_restarts, window, idle, heard):
        policy = {
            "maxRestarts": max_restarts,
            "restartWindowSeconds": window,
            "maxDisruptionsWithoutProgress": idle,
            "stallTimeoutSeconds": 600,
        }
        self.cluster = Cluster()
        self.loop = Loop(self.cluster, spec_of(runPolicy=policy), checkpoint=0 if heard else None)

    @precondition(lambda self: self.loop.checkpoint is not None)
    @rule()
    def a_checkpoint_is_complete(self):
        if any(pod.running for key, pod in self.cluster.pods.items() if key[1] == 0):
            self.loop.checkpoint += 10

    @rule()
    def reconcile(self):
        self.loop.reconcile()

    @rule()
    def reconcile_and_lose_the_write(self):
        self.loop.reconcile(lose_write=True)

    @rule()
    def controllers(self):
        self.cluster.sync()

    @rule()
    def everything_moves(self):
        """What happens nearly all the time, so that histories get somewhere."""
        self.loop.reconcile()
        self.cluster.sync()
        self.kubelets_start()
        self.loop.reconcile()

    def kubelets_start(self):
        for number in list(self.cluster.jobs):
            self.cluster.start(number)

    @rule()
    def kubelets_confirm(self):
        self.cluster.reap()

    @rule(seconds=st.sampled_from([1, 30, 120, 400]))
    def time_passes(self, seconds):
        self.cluster.now += timedelta(seconds=seconds)

    @rule(which=index, code=st.sampled_from([EXIT_COMPLETE, EXIT_CRASHED, EXIT_INVALID, EXIT_PREEMPTED, 137]))
    def a_container_ends(self, which, code):
        for key, pod in list(self.cluster.pods.items()):
            if key[1] == which and pod.running and key not in self.cluster.dead:
                self.cluster.end(key, code)
                self.failures += code in (EXIT_CRASHED, 137)
                self.disturbances += code == EXIT_PREEMPTED
                if code == EXIT_INVALID and key[0] in self.cluster.jobs:
                    self.invalid_at = key[0]

    @rule()
    def everybody_succeeds(self):
        for key, pod in list(self.cluster.pods.items()):
            if pod.running and pod.delete_by is None and key not in self.cluster.dead:
                self.cluster.end(key, EXIT_COMPLETE)

    @rule(which=index)
    def a_pod_is_evicted(self, which):
        for key, pod in list(self.cluster.pods.items()):
            if key[1] == which and pod.running:
                self.disturbances += 1
                self.cluster.ask(key)
                self.cluster.end(key, EXIT_PREEMPTED, "EvictionByEvictionAPI")

    @rule(which=index)
    def a_pod_is_deleted(self, which):
        for key, pod in list(self.cluster.pods.items()):
            if key[1] == which and pod.running and pod.delete_by is None:
                self.disturbances += 1
                self.cluster.ask(key)

    @rule(which=index)
    def a_node_dies(self, which):
        self.disturbances += 1
        self.cluster.dead |= {
            key for key, pod in self.cluster.pods.items() if key[1] == which and pod.running
        }

    @rule()
    def somebody_deletes_a_job(self):
        for number in list(self.cluster.jobs)[:1]:
            self.disturbances += 1
            self.cluster.delete_job(number)

    @rule()
    def suspend_and_resume(self):
        self.set_suspend(True)
        self.loop.reconcile()
        self.set_suspend(False)
        self.loop.reconcile()

    @rule(suspend=st.booleans())
    def set_suspend(self, suspend):
        policy = self.loop.spec.run_policy.model_copy(update={"suspend": suspend})
        self.loop.spec = self.loop.spec.model_copy(update={"run_policy": policy})

    @precondition(lambda self: self.ending is None)
    @rule()
    def the_status_is_wiped(self):
        self.disturbances += 1  # a Job that a suspension deletes looks then as if somebody had
        self.loop.status, self.restarts = FineTuneStatus(), 0

    @precondition(lambda self: any(pod.running for pod in self.cluster.pods.values()))
    @rule()
    def a_rank_hangs(self):
        self.loop.hangs = True
        self.failures += 1
        self.loop.reconcile()
        self.loop.hangs = False

    @invariant()
    def attempts_never_overlap(self):
        if hasattr(self, "cluster"):
            assert not self.cluster.broken_rule

    @invariant()
    def restarts_only_grow_and_stay_within_the_limit(self):
        if not hasattr(self, "loop"):
            return
        status, policy = self.loop.status, self.loop.spec.run_policy
        assert (status.restarts_used or 0) <= policy.max_restarts
        assert (status.restarts_used or 0) <= status.restarts
        assert self.restarts <= status.restarts <= self.failures, "a disruption was counted"
        self.restarts = status.restarts

    @invariant()
    def without_progress_nothing_is_given_back(self):
        if hasattr(self, "loop") and not self.loop.checkpoint:
            assert self.loop.status.restarts == (self.loop.status.restarts_used or 0)

    @invariant()
    def disruptions_are_told_by_reason_and_end_a_run_only_without_progress(self):
        if not hasattr(self, "loop"):
            return
        status, limit = self.loop.status, self.loop.spec.run_policy.max_disruptions_without_progress
        assert sum(status.disruption_reasons.values()) == status.disruptions
        assert status.disruptions_without_progress <= min(limit + 1, status.disruptions)
        ending = read_ledger(status).ending
        if ending is not None and ending.reason == Reason.NO_PROGRESS:
            assert status.disruptions_without_progress == limit + 1
            assert self.disturbances > 0

    @invariant()
    def an_end_is_final(self):
        if not hasattr(self, "loop"):
            return
        ending = read_ledger(self.loop.status).ending
        if self.ending is not None:
            assert ending == self.ending
        self.ending = ending

    @invariant()
    def at_most_one_attempt_is_open_and_numbers_grow(self):
        if not hasattr(self, "loop"):
            return
        attempts = self.loop.status.attempts
        assert [a.number for a in attempts] == sorted({a.number for a in attempts})
        assert all(attempt.outcome is not None for attempt in attempts[:-1])

    @invariant()
    def a_pass_that_learns_nothing_changes_nothing(self):
        if hasattr(self, "loop") and self.ending is not None:
            before = self.loop.status
            assert self.loop.reconcile() == before

    def teardown(self):
        """In peace, every run ends: complete, or failed for a reason that was given."""
        if not hasattr(self, "loop"):
            return
        self.set_suspend(False)
        self.cluster.dead.clear()
        for _ in range(60):
            self.cluster.now += timedelta(seconds=310)
            self.loop.reconcile()
            self.cluster.sync()
            self.cluster.reap()
            self.kubelets_start()
            self.everybody_succeeds()
        ending = read_ledger(self.loop.status).ending
        assert ending is not None, self.loop.status
        if self.failures == 0 and self.invalid_at is None and ending.reason != Reason.NO_PROGRESS:
            assert ending.complete, ending
        if not ending.complete:
            assert ending.message


FineTuneLife.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestFineTuneLife = FineTuneLife.TestCase
