"""A long run by a simulated clock: what the operator asks of the API server, request by request.

The operator's own pure code decides: when an answer of rank 0 is worth a pass, what the status then is,
when it is worth a write, which events are told. Simulated are the cluster, rank 0's answers and the time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tests.support.attempts import START, Cluster, accepted, spec_of
from tests.support.finetunes import progress_of
from yuan2_core.contract import Progress
from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus
from yuan2_operator.apply import create_only
from yuan2_operator.config import Settings
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune, references
from yuan2_operator.plan.owner import Owner
from yuan2_operator.status.attempts import World, advance, read_ledger
from yuan2_operator.status.events import attempt_events, condition_events
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.progress import Written, worth_a_pass, worth_writing, written

STARTING, PREPARING, LOADING, EXPORTING = 5.0, 60.0, 60.0, 120.0
"""Seconds until the pods run, and of each phase beside the training."""


@dataclass(frozen=True)
class Run:
    """How long a run trains, and in how many steps."""

    seconds: float
    steps: int
    checkpoints: int

    def __str__(self) -> str:
        hours = f"{self.seconds / 3600:g} h" if self.seconds >= 3600 else f"{self.seconds:g} s"
        checkpoints = f"{self.checkpoints} checkpoint{'s' if self.checkpoints > 1 else ''}"
        return f"{hours} of training, {self.steps:,} steps, {checkpoints}"

    @property
    def end(self) -> float:
        """Seconds from the pods' start to their end."""
        return PREPARING + LOADING + self.seconds + EXPORTING

    def says(self, age: float) -> Progress:
        """What rank 0 says so many seconds after its start."""
        trained = min(max(0.0, age - PREPARING - LOADING), self.seconds)
        each = self.seconds / self.steps
        step = int(trained / each)
        every = self.steps // self.checkpoints
        state = "preparing" if age < PREPARING else "loading" if age < PREPARING + LOADING else "training"
        return progress_of(
            "run",
            step=step,
            total=self.steps if state == "training" else 0,
            state="exporting" if step == self.steps else state,
            last_checkpoint_step=step // every * every or None,
            last_step_age_seconds=trained - step * each if step else None,
            eta_seconds=self.seconds - trained,
            seconds_in_steps=step * each,
            seconds_total=age,
        )


@dataclass
class Simulation:
    """The operator over one run; the clock moves from question to question."""

    run: Run
    spec: FineTuneSpec = field(default_factory=spec_of)
    status: FineTuneStatus = field(default_factory=FineTuneStatus)
    cluster: Cluster = field(default_factory=Cluster)
    requests: Counter[str] = field(default_factory=Counter)
    writes: list[float] = field(default_factory=list)
    """Seconds since the creation at which the status was written."""
    _written: Written | None = None
    _told: tuple[Progress, datetime] | None = None

    def go(self) -> Simulation:
        """From the creation to Complete."""
        settings = Settings()
        self._begin()
        self._pass(None)
        self.cluster.sync()
        self._at(STARTING)
        self.cluster.start(1)
        self._pass(None)
        polls = int(self.run.end / settings.poll_seconds)
        resyncs = max(1, int(settings.resync_seconds / settings.poll_seconds))
        for number in range(1, polls + 1):
            age = number * settings.poll_seconds
            self._at(STARTING + age)
            self._hear(self.run.says(age), resync=number % resyncs == 0)
        for index in range(self.cluster.replicas):
            self.cluster.end((1, index), 0)
        self.cluster.sync()
        self._pass(self.run.says(self.run.end))
        return self

    def _begin(self) -> None:
        """Looking references up and making the objects of the first attempt."""
        owner = Owner(kind="Yuan2FineTune", namespace="demo", name="run", uid="uid", generation=1)
        plan = plan_finetune(
            owner, self.spec, attempt=1, restarts=0, missing=(), default_image="registry.example/train:1"
        )
        assert isinstance(plan, FineTunePlan)
        looked_up = {(reference.kind, reference.name) for reference in references(self.spec)}
        self.requests["references"] = len(looked_up)
        # What is applied again later is looked for before: `Applier`.
        self.requests["objects"] = sum(1 if create_only(one) else 2 for one in finetune_manifests(plan))

    def _at(self, seconds: float) -> None:
        self.cluster.now = START + timedelta(seconds=seconds)

    def _hear(self, said: Progress, resync: bool) -> None:
        now = self.cluster.now
        known, told = self._told or (None, now)
        wakes = worth_a_pass(known, said, (now - told).total_seconds())
        if wakes:
            self._told = (said, now)
        if wakes or resync:
            self._pass(said)

    def _pass(self, progress: Progress | None) -> None:
        """One pass, as `FineTuneReconciler` has it."""
        now, policy, world = (
            self.cluster.now,
            self.spec.run_policy,
            World(self.cluster.views(), said=progress),
        )
        ledger = advance(read_ledger(self.status), world, policy, accepted=False, now=now)
        begun = advance(ledger, world, policy, accepted=True, now=now)
        if begun.open is not None and begun.number != ledger.number:
            self.cluster.create_job(begun.number, begun.restarts)
        finding = Finding("uid", 1, begun, world, accepted(), progress=progress)
        prior, status = self.status, compose(self.spec, self.status, finding, now)
        if not worth_writing(prior, status, self._written, now):
            return
        self.status, self._written = status, written(self._written, prior, status, now)
        self.writes.append((now - START).total_seconds())
        self.requests["status"] += 1
        events = [
            *attempt_events(prior.attempts, status.attempts),
            *condition_events(prior.conditions, status.conditions),
        ]
        self.requests["events"] += len(events)
