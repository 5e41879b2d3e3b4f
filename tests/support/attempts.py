"""A small model of the Job controller, the kubelet and the operator's loop, to drive the state machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone

from tests.support.finetunes import MINIMAL, merged, progress_of
from yuan2_core.contract import EXIT_INVALID, EXIT_PREEMPTED, Progress
from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus
from yuan2_operator.constants import CONDITION_ACCEPTED, Reason
from yuan2_operator.status.attempts import World, advance, read_ledger, unwanted
from yuan2_operator.status.conditions import Verdict
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.judgement import AttemptView, JobFacts
from yuan2_operator.status.pods import PodFacts, Problem
from yuan2_operator.status.stall import Pulse

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
GRACE = timedelta(seconds=30)


def spec_of(**changes: object) -> FineTuneSpec:
    """The minimal spec with changes."""
    return FineTuneSpec.model_validate(merged(MINIMAL, changes))


def accepted() -> Verdict:
    """The condition of a spec whose references are all there."""
    return Verdict(CONDITION_ACCEPTED, "True", Reason.VALID, "plan")


@dataclass
class Cluster:
    """Jobs and pods, and what controllers do with them when `sync` is called."""

    replicas: int = 2
    now: datetime = START
    jobs: dict[int, JobFacts] = field(default_factory=dict)
    pods: dict[tuple[int, int], PodFacts] = field(default_factory=dict)
    dead: set[tuple[int, int]] = field(default_factory=set)
    """Pods on a node that has died: they never report their end."""
    broken_rule: str = ""

    def views(self) -> dict[int, AttemptView]:
        numbers = {*self.jobs, *(number for number, _ in self.pods)}
        return {
            number: AttemptView(
                number,
                self.jobs.get(number),
                tuple(pod for key, pod in sorted(self.pods.items()) if key[0] == number),
            )
            for number in numbers
        }

    def create_job(self, number: int, restarts: int) -> None:
        """As POST: a second one changes nothing."""
        if number not in self.jobs:
            self.jobs[number] = JobFacts(
                f"x-{number}", number, created=self.now, restarts=restarts, pods=self.replicas
            )

    def delete_job(self, number: int) -> None:
        if number in self.jobs:
            self.jobs[number] = replace(self.jobs[number], deleting=True)

    def sync(self) -> None:
        """One round of the Job controller and the garbage collector."""
        for number, job in list(self.jobs.items()):
            pods = {key: pod for key, pod in self.pods.items() if key[0] == number}
            if job.deleting:
                self._end(pods)
                if not pods:
                    del self.jobs[number]
            elif job.failing:
                self._end(pods)
            elif not job.complete:
                self._run(number, job, pods)

    def _run(self, number: int, job: JobFacts, pods: dict[tuple[int, int], PodFacts]) -> None:
        failed = [pod for pod in pods.values() if pod.phase == "Failed"]
        lost = len(pods) < self.replicas and any(pod.started for pod in pods.values())
        if failed or lost:
            self.jobs[number] = replace(job, failing=True, failure=_failure(failed))
            self._end(pods)
        elif len(pods) == self.replicas and all(pod.phase == "Succeeded" for pod in pods.values()):
            self.jobs[number] = replace(job, complete=True)
        elif not pods:
            self._check_alone(number)
            for index in range(self.replicas):
                self.pods[(number, index)] = PodFacts(f"x-{number}-{index}", index, number, "Pending")

    def _end(self, pods: dict[tuple[int, int], PodFacts]) -> None:
        for key, pod in pods.items():
            if not pod.terminal and pod.delete_by is None:
                self.ask(key)

    def _check_alone(self, number: int) -> None:
        alive = [key for key, pod in self.pods.items() if key[0] != number and not pod.settled(self.now)]
        if alive:
            self.broken_rule = f"pods of attempt {number} are made while {alive} live"

    def ask(self, key: tuple[int, int]) -> None:
        """Somebody deletes a pod."""
        pod = self.pods[key]
        self.pods[key] = replace(pod, deletion_requested=self.now, delete_by=self.now + GRACE)

    def start(self, number: int) -> None:
        for key, pod in self.pods.items():
            if key[0] == number and pod.phase == "Pending" and pod.delete_by is None:
                self.pods[key] = replace(pod, phase="Running", running=True, started=self.now)

    def end(self, key: tuple[int, int], code: int, disruption: str | None = None) -> None:
        """A pod's container ends."""
        pod = self.pods[key]
        problem = Problem("Ended", f"pod {pod.name} ended with {code}") if code else None
        self.pods[key] = replace(
            pod,
            phase="Failed" if code else "Succeeded",
            running=False,
            finished=self.now,
            exit_code=code,
            disruption=disruption,
            problem=problem,
        )

    def reap(self) -> None:
        """Kubelets confirm: deleted pods end and vanish, unless their node is dead."""
        for key, pod in list(self.pods.items()):
            if pod.delete_by is not None and key not in self.dead:
                del self.pods[key]


@dataclass
class Loop:
    """The operator's loop without its edges: what a pass reads, decides and writes."""

    cluster: Cluster
    spec: FineTuneSpec
    status: FineTuneStatus = field(default_factory=FineTuneStatus)
    hangs: bool = False
    """Rank 0 says that it has done nothing for too long."""
    checkpoint: int | None = None
    """Step of the newest checkpoint, which rank 0 says while it runs; None: it cannot be asked."""

    def reconcile(self, *, lose_write: bool = False) -> FineTuneStatus:
        """One pass. With `lose_write` the process dies after making objects, before writing the status."""
        pulse = Pulse("training", 601.0, 600.0, "spec.runPolicy.stallTimeoutSeconds") if self.hangs else None
        prior, now = read_ledger(self.status), self.cluster.now
        said = self._said(prior.number) if prior.open is not None else None
        world = World(self.cluster.views(), pulse, said)
        before = advance(prior, world, self.spec.run_policy, accepted=False, now=now)
        ledger = advance(before, world, self.spec.run_policy, accepted=True, now=now)
        if ledger.open is not None and ledger.number != before.number:
            self.cluster.create_job(ledger.number, ledger.restarts)
        if lose_write:
            return self.status
        finding = Finding("uid", 1, ledger, world, accepted(), progress=said)
        self.status = compose(self.spec, self.status, finding, now)
        for number in unwanted(ledger, world):
            self.cluster.delete_job(number)
        return self.status

    def _said(self, attempt: int) -> Progress | None:
        """What rank 0 of the open attempt says, if it runs."""
        trainer = self.cluster.pods.get((attempt, 0))
        if self.checkpoint is None or trainer is None or not trainer.running or trainer.delete_by:
            return None
        return progress_of("x", attempt, self.checkpoint + 1, last_checkpoint_step=self.checkpoint or None)


def _failure(failed: list[PodFacts]) -> str:
    """What the Job controller says, in its words."""
    for pod in failed:
        where = f"for pod demo/{pod.name}"
        if pod.exit_code == EXIT_INVALID:
            return f"Container pytorch {where} failed with exit code 78 matching FailJob rule"
    for pod in failed:
        if pod.disruption is not None:
            return f"Pod demo/{pod.name} has condition DisruptionTarget matching FailJob rule"
    for pod in failed:
        if pod.exit_code == EXIT_PREEMPTED:
            where = f"for pod demo/{pod.name}"
            return f"Container pytorch {where} failed with exit code 75 matching FailJob rule"
    return "Job has reached the specified backoff limit"
