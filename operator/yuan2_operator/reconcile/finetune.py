"""One pass over a Yuan2FineTune."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus, RunEstimate
from yuan2_operator.api.schema import rfc3339
from yuan2_operator.apply import Occupied, key_of, owned
from yuan2_operator.cache import Object
from yuan2_operator.client import (
    CONFIG_MAPS,
    FINETUNES,
    JOBS,
    PODS,
    SERVICES,
    WORKLOADS,
    Forbidden,
    Invalid,
)
from yuan2_operator.constants import CONDITION_ACCEPTED, KIND_FINETUNE, Reason
from yuan2_operator.logs import note_attempt
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.capacity import demand
from yuan2_operator.plan.estimate import PreparedData, acceptance, estimate_of, status_estimate
from yuan2_operator.plan.finetune import FineTunePlan, config_name, job_name, plan_finetune, references
from yuan2_operator.plan.output import reject_taken
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.references import Rejection
from yuan2_operator.plan.scheduling import gives_place_back, in_kueue, workload_name
from yuan2_operator.queue import Key
from yuan2_operator.reconcile.accounting import GpuMeter, count_endings, pods_held
from yuan2_operator.reconcile.context import Context
from yuan2_operator.reconcile.polling import Target, Word
from yuan2_operator.reconcile.refusal import read_final_status, read_spec
from yuan2_operator.status.attempts import Ledger, World, advance, read_ledger, unwanted
from yuan2_operator.status.budget import offenders
from yuan2_operator.status.conditions import Verdict
from yuan2_operator.status.events import attempt_events, condition_events
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.judgement import AttemptView, JobFacts, read_job
from yuan2_operator.status.pods import PodFacts, Problem, read_pod
from yuan2_operator.status.progress import Written, write_delay, written
from yuan2_operator.status.schedule import Outlook, Rhythm, next_look, removal_time
from yuan2_operator.status.stall import take_pulse, whereabouts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """The resource that a pass is about."""

    owner: Owner
    spec: FineTuneSpec
    created: str
    """When it was made, as the API has it: the older of two runs goes first."""
    unknown: str | None
    """What the spec has that this operator does not know: no attempt begins with it."""
    labels: Mapping[str, str]
    prior: FineTuneStatus
    before: Object
    """The prior status as the API has it."""
    now: datetime
    prepared: PreparedData | None = None
    """What is known of its data."""


@dataclass(frozen=True)
class Decision:
    """What a pass has decided."""

    ledger: Ledger
    acceptance: Verdict
    estimate: RunEstimate | None = None
    """What an accepted run will need."""
    plan: FineTunePlan | None = None
    """The open attempt, whose objects must exist."""
    fallback: Ledger | None = None
    """The ledger without the attempt that begins in this pass."""
    config: str | None = None
    """The ConfigMap of the attempt that begins, or tries to, in this pass."""


class FineTuneReconciler:
    """Keeps, beside the context, only what may be lost: when progress was last written."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._written: dict[Key, Written] = {}
        self._meter = GpuMeter(context.settings.metrics_label)

    async def reconcile(self, key: Key) -> float | None:
        """Observe, decide, apply, write the status, tell, clean up; gives the seconds to the next look."""
        body = self._context.cache.itself(FINETUNES.plural, key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            # Its children go with it: the garbage collector follows their owner references.
            self._meter.read(key, {}, 0, self._context.clock())
            self._written.pop(key, None)
            self._context.poller.drop(key)
            return None
        owner = Owner.of({"kind": KIND_FINETUNE, **body})
        prior = await read_final_status(self._context, FINETUNES, FineTuneStatus, owner, body)
        if prior is None:
            return None
        runs = read_ledger(prior).open is not None
        reading = await read_spec(self._context, FINETUNES, FineTuneSpec, owner, body, runs=runs)
        if reading is None:
            return None
        now = self._context.clock()
        return await self._pass(
            key,
            Subject(
                owner,
                reading.spec,
                body["metadata"].get("creationTimestamp", ""),
                reading.unknown,
                body["metadata"].get("labels", {}),
                prior,
                prior.to_api(),
                now,
            ),
        )

    async def _pass(self, key: Key, subject: Subject) -> float | None:
        world = await self._observe(subject)
        note_attempt(read_ledger(subject.prior).number)
        gpus = pods_held(world) * (subject.spec.workers.gpus_per_worker or 0)
        self._meter.read(key, subject.labels, gpus, subject.now)
        word = self._hear(key, subject, world)
        progress, attempt = word.progress, read_ledger(subject.prior).open
        subject = replace(subject, prepared=PreparedData.known(subject.prior, progress))
        world = replace(world, pulse=take_pulse(subject.spec, progress, attempt, subject.now), said=progress)
        world = await self._locate(subject, world)
        decision = await self._decide(subject, world)
        if in_kueue(subject.spec.scheduling) and half_done(
            read_ledger(subject.prior), decision.ledger, world
        ):
            await self._leave_queue(subject)
        decision, trouble = await self._apply(subject, decision, world)
        finding = Finding(
            uid=subject.owner.uid,
            generation=subject.owner.generation,
            ledger=decision.ledger,
            world=world,
            acceptance=decision.acceptance,
            estimate=decision.estimate,
            progress=progress,
            silence=word.silence,
            room=await self._room(subject, decision.ledger, world),
            trouble=trouble,
        )
        status, held = await self._write(key, subject, finding)
        await self._clean_up(subject, status, decision, world)
        outlook = Outlook(
            ledger=decision.ledger,
            world=world,
            accepted=decision.acceptance.status == "True",
            trouble=trouble is not None,
        )
        rhythm = Rhythm(self._context.settings.poll_seconds, self._context.settings.missing_seconds)
        look = next_look(subject.spec.run_policy, status, outlook, rhythm, subject.now)
        return min((delay for delay in (look, held) if delay is not None), default=None)

    async def _observe(self, subject: Subject) -> World:
        """Jobs and pods from the cache; a Job that is missing there is looked for where it cannot be."""
        owner, cache = subject.owner, self._context.cache
        jobs = cache.of(JOBS.plural, key_of(owner))
        ours = {job["metadata"]["name"]: job for job in jobs if owned(job, owner)}
        ledger = read_ledger(subject.prior)
        if ledger.open is not None and job_name(owner.name, ledger.number) not in ours:
            live = await self._context.observer.job(owner.namespace, job_name(owner.name, ledger.number))
            if live is not None and owned(live, owner):
                cache.remember(JOBS.plural, key_of(owner), live)
                ours[live["metadata"]["name"]] = live
        pods = cache.of(PODS.plural, key_of(owner))
        return build_world(list(ours.values()), pods, strangers=len(jobs) > len(ours), now=subject.now)

    def _hear(self, key: Key, subject: Subject, world: World) -> Word:
        """What rank 0 of the open attempt has said, if it runs; it is asked from now on."""
        ledger = read_ledger(subject.prior)
        trainer = _trainer(ledger, world)
        target = None if trainer is None else Target(trainer.name, trainer.ip, ledger.number)
        return self._context.poller.hear(key, target)

    async def _locate(self, subject: Subject, world: World) -> World:
        """Where the ranks of an attempt are that will be ended because it hangs: nobody can look later."""
        ledger, owner = read_ledger(subject.prior), subject.owner
        if ledger.open is None or world.pulse is None or not world.pulse.hangs:
            return world
        running = [pod for pod in world.view(ledger.number).pods if pod.running]
        stacks = await self._context.observer.stacks(owner.namespace, running)
        for pod, text in stacks.items():
            logger.warning("%s/%s hangs, stacks of pod %s:\n%s", owner.namespace, owner.name, pod, text)
        return replace(world, pulse=replace(world.pulse, where=whereabouts(stacks)))

    async def _room(self, subject: Subject, ledger: Ledger, world: World) -> str | None:
        """What the nodes have free, if a pod of the open attempt fits none."""
        pods = world.view(ledger.number).pods if ledger.open is not None else ()
        wanted = demand(subject.spec)
        if wanted is None or not any(
            pod.problem is not None and pod.problem.reason == Reason.UNSCHEDULABLE for pod in pods
        ):
            return None
        return await self._context.observer.room(wanted)

    async def _decide(self, subject: Subject, world: World) -> Decision:
        """The ledger after what was seen; what a new attempt refers to is looked up only when one is due."""
        policy, now = subject.spec.run_policy, subject.now
        ledger = advance(read_ledger(subject.prior), world, policy, accepted=False, now=now)
        if ledger.ending is not None or ledger.open is not None:
            return Decision(ledger, *_accepted(subject), self._plan_open(subject, ledger))
        if subject.unknown is not None:
            refusal = Verdict(CONDITION_ACCEPTED, "False", Reason.INVALID_SPEC, subject.unknown)
            return Decision(ledger, refusal)
        taken = self._taken(subject, ledger)
        if taken is not None:
            return Decision(ledger, Verdict(CONDITION_ACCEPTED, "False", taken.reason, taken.message))
        missing = await self._context.observer.missing(subject.owner.namespace, references(subject.spec))
        plan = plan_finetune(
            subject.owner,
            subject.spec,
            attempt=ledger.number + 1,
            restarts=ledger.restarts,
            missing=missing,
            default_image=ledger.image or self._context.settings.train_image,
            avoid=offenders(ledger.node_failures),
            privileges=self._context.settings.pod_privileges,
        )
        if isinstance(plan, Rejection):
            return Decision(ledger, Verdict(CONDITION_ACCEPTED, "False", plan.reason, plan.message))
        begun = advance(ledger, world, policy, accepted=True, now=now)
        begins = plan if begun.open is not None else None
        if begins is not None:
            begun = begun.note(image=plan.image)
        config = config_name(plan) if begins is not None else None
        return Decision(begun, *_accepted(subject), begins, fallback=ledger, config=config)

    def _taken(self, subject: Subject, ledger: Ledger) -> Rejection | None:
        """The refusal of an output that another run of the namespace writes."""
        cache, mine = self._context.cache, subject.owner
        others = [
            body
            for key in cache.keys(FINETUNES.plural)
            if key.namespace == mine.namespace and key.name != mine.name
            if (body := cache.itself(FINETUNES.plural, key)) is not None
        ]
        return reject_taken(
            subject.spec, mine.name, begun=ledger.number > 0, since=subject.created, others=others
        )

    def _plan_open(self, subject: Subject, ledger: Ledger) -> FineTunePlan | None:
        """The plan of an attempt that has begun: its other objects are kept in repair."""
        if ledger.open is None:
            return None
        plan = plan_finetune(
            subject.owner,
            subject.spec,
            attempt=ledger.number,
            restarts=ledger.restarts,
            missing=(),
            default_image=ledger.image or self._context.settings.train_image,
            avoid=offenders(ledger.node_failures),
            privileges=self._context.settings.pod_privileges,
        )
        return plan if isinstance(plan, FineTunePlan) else None

    async def _apply(
        self, subject: Subject, decision: Decision, world: World
    ) -> tuple[Decision, Problem | None]:
        """Have the open attempt's objects exist; if the cluster refuses one, the attempt has not begun."""
        if decision.plan is None:
            return decision, None
        manifests = finetune_manifests(decision.plan)
        if decision.fallback is None:
            job = world.view(decision.ledger.number).job
            manifests = repairable(manifests, job.config if job is not None else None)
        try:
            await self._context.applier.ensure(subject.owner, manifests)
        except (Occupied, Forbidden, Invalid) as error:
            ledger = decision.fallback or decision.ledger
            text = f"the cluster refused an object of attempt {decision.ledger.number}: {error}"
            logger.warning("%s/%s: %s", subject.owner.namespace, subject.owner.name, text)
            return replace(decision, ledger=ledger, plan=None), Problem(Reason.RECONCILE_FAILED, text)
        return decision, None

    async def _write(
        self, key: Key, subject: Subject, finding: Finding
    ) -> tuple[FineTuneStatus, float | None]:
        """Write the status if it is worth it, then tell about what changed; gives the status, and after how
        many seconds it must be written if not now."""
        prior, status = subject.prior, compose(subject.spec, subject.prior, finding, subject.now)
        delay = write_delay(prior, status, self._written.get(key), subject.now)
        if delay != 0:
            return status, delay
        if in_kueue(subject.spec.scheduling) and gives_place_back(prior.conditions, status.conditions):
            await self._leave_queue(subject)
        await self._context.write_status(FINETUNES, subject.owner, subject.before, status.to_api())
        self._written[key] = written(self._written.get(key), prior, status, subject.now)
        count_endings(subject.owner.namespace, prior.attempts, status.attempts)
        attempts = attempt_events(prior.attempts, status.attempts)
        await self._context.tell(
            subject.owner, [*attempts, *condition_events(prior.conditions, status.conditions)]
        )
        return status, None

    async def _leave_queue(self, subject: Subject) -> None:
        """Delete the Workload of the run; the pods of a later attempt make another."""
        owner = subject.owner
        await self._context.client.delete(WORKLOADS, owner.namespace, workload_name(owner))

    async def _clean_up(
        self, subject: Subject, status: FineTuneStatus, decision: Decision, world: World
    ) -> None:
        """Delete Jobs that must end, are too old, or whose time after the end has passed, and what belonged
        to them; the status is written."""
        ledger = decision.ledger
        owner, applier, now = subject.owner, self._context.applier, rfc3339(subject.now)
        removal = removal_time(subject.spec.run_policy, status)
        expired = ledger.ending is not None and removal is not None and removal <= subject.now
        doomed = unwanted(ledger, world)
        for number, view in sorted(world.views.items()):
            if view.job is None or view.job.deleting or not (expired or number in doomed):
                continue
            stops = not view.job.finishing
            await applier.remove(owner, "Job", job_name(owner.name, number), now, wait=stops)
        jobs = [view.job for view in world.views.values() if view.job is not None]
        kept = {decision.config, *(job.config or job.name for job in jobs)}
        for config in self._context.cache.of(CONFIG_MAPS.plural, key_of(owner)):
            if config["metadata"]["name"] not in kept:
                await applier.remove(owner, "ConfigMap", config["metadata"]["name"], now)
        if ledger.ending is not None and world.quiet(subject.now):
            for service in self._context.cache.of(SERVICES.plural, key_of(owner)):
                await applier.remove(owner, "Service", service["metadata"]["name"], now)


def half_done(before: Ledger, after: Ledger, world: World) -> bool:
    """An attempt that one rank had ended well has just ended, and another will follow. Kueue counts that pod
    as done for good and would delete the next pod of its rank: the group must begin anew."""
    ended = before.open
    if ended is None or after.ending is not None or (after.open and after.open.number == ended.number):
        return False
    return any(pod.exit_code == 0 for pod in world.view(ended.number).pods)


def repairable(manifests: list[Object], config: str | None) -> list[Object]:
    """Objects of an attempt under way that may be made again: never its Job, which exists or has ended, its
    job file only if the Job names this very one, and no PodGroup, which is not watched."""
    return [
        manifest
        for manifest in manifests
        if manifest["kind"] not in ("Job", "PodGroup")
        and (manifest["kind"] != "ConfigMap" or manifest["metadata"]["name"] == config)
    ]


def build_world(jobs: list[Object], pods: list[Object], *, strangers: bool, now: datetime) -> World:
    """Jobs and pods by attempt. `strangers`: Jobs of an earlier FineTune of the same name are still there."""
    facts: dict[int, JobFacts] = {job.attempt: job for job in map(read_job, jobs)}
    by_attempt: dict[int, list[PodFacts]] = {}
    mine = {job["metadata"]["uid"] for job in jobs}
    foreign = strangers
    for pod in pods:
        seen = read_pod(pod)
        controllers = {reference["uid"] for reference in pod["metadata"].get("ownerReferences", ())}
        if controllers & mine or not strangers:
            by_attempt.setdefault(seen.attempt, []).append(seen)
        elif not seen.settled(now):
            foreign = True
    views = {
        number: AttemptView(
            number, facts.get(number), tuple(sorted(by_attempt.get(number, ()), key=lambda pod: pod.index))
        )
        for number in {*facts, *by_attempt}
    }
    return World(views, foreign=foreign)


def _trainer(ledger: Ledger, world: World) -> PodFacts | None:
    """The pod of rank 0, if it runs and is to go on."""
    if ledger.open is None:
        return None
    pods = world.view(ledger.number).pods
    return next((pod for pod in pods if pod.index == 0 and pod.running and pod.delete_by is None), None)


def _accepted(subject: Subject) -> tuple[Verdict, RunEstimate | None]:
    """The condition Accepted of a run that has begun, since it was accepted then, and what it will need."""
    estimate = estimate_of(subject.spec, subject.prepared)
    reason, message = acceptance(subject.spec, estimate)
    verdict = Verdict(CONDITION_ACCEPTED, "True", reason, message)
    return verdict, status_estimate(subject.spec, estimate)
