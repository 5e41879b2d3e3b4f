"""Many runs at once: the operator on a real control plane with a real scheduler and kwok's nodes.

Sides take turns, since the machine's speed changes. A plain Job is the FineTune's own, with its Service but
without owner, ConfigMap and operator, so that both make the same pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from tests.bench.report import Row, at_most, compared, percentile, plain
from tests.support.attempts import spec_of
from tests.support.cluster import TestCluster
from tests.support.finetunes import finetune_object, progress_of
from tests.support.kwok import job_controller_limits, make_claims, simulated_nodes
from tests.support.operator_process import QUICK, Operator, service_account_kubeconfig
from tests.support.waiting import wait_for
from yuan2_core.contract import PORT_PROGRESS
from yuan2_operator.constants import KIND_FINETUNE
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner

NAMESPACE = "fleet"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
RUNS = f"/apis/yuan2.dev/v1alpha1/namespaces/{NAMESPACE}/yuan2finetunes"
GPUS = {"workers": {"processesPerWorker": None, "gpusPerWorker": 4}}
ONE = {"workers": {"replicas": 1}}
SUBMITTERS = 8
SETTINGS = {**QUICK, "YUAN2_POLL_SECONDS": "5", "YUAN2_MISSING_SECONDS": "10"}
"""The defaults, where tests are quicker."""
CREATION, CREATION_DEFAULT, CPU_MS = 1.25, 1.10, 12.0
MEMORY_MB, CPU_SHARE, COLD_SECONDS, JOB_SECONDS, RESTART_SECONDS = 150.0, 0.10, 30.0, 1.0, 12.0


@dataclass(frozen=True)
class Sizes:
    """How many of what."""

    runs: int
    pairs: int
    running: int
    seconds: float
    """For which running runs are watched."""
    finished: int
    changes: int
    nodes: int


FULL = Sizes(runs=200, pairs=3, running=1000, seconds=60.0, finished=5000, changes=100, nodes=200)
SMALL = Sizes(runs=2, pairs=1, running=2, seconds=3.0, finished=3, changes=2, nodes=2)


def measure(cluster: TestCluster, root: Path, sizes: Sizes = FULL) -> list[Row]:
    """All rows; the cluster is the measurement's alone."""
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    cluster.client.create("/api/v1/namespaces", body)
    make_claims(cluster.client, NAMESPACE, ("models", "data"))
    operator = Operator(service_account_kubeconfig(cluster, root), root / "fleet.log", SETTINGS)
    with simulated_nodes(cluster, root, sizes.nodes):
        fleet = Fleet(cluster, operator, sizes)
        with operator.running():
            rows = [*fleet.creation(raised=True), *fleet.creation(raised=False)]
            job_controller_limits(cluster, raised=True)
            rows += [*fleet.running(), *fleet.changes()]
        return [*rows, *fleet.cold_start()]


@dataclass(frozen=True)
class Fleet:
    """What is measured, on one cluster."""

    cluster: TestCluster
    operator: Operator
    sizes: Sizes

    def creation(self, *, raised: bool) -> list[Row]:
        """Seconds until the pods of all runs run, and the operator's processor time for it."""
        job_controller_limits(self.cluster, raised=raised)
        # The controllers have just started: their first Job is no measurement.
        self._until_all_run(plain_job, JOBS, 1)
        self._remove(JOBS, SERVICES)
        sides, processor = [], []
        for _ in range(self.sizes.pairs if raised else 1):
            before = self._processor_seconds()
            ours = self._until_all_run(finetune_object, RUNS, self.sizes.runs)
            processor.append((self._processor_seconds() - before) / self.sizes.runs * 1000)
            self._remove(RUNS)
            theirs = self._until_all_run(plain_job, JOBS, self.sizes.runs)
            self._remove(JOBS, SERVICES)
            sides.append((ours, theirs))
        limits = "raised" if raised else "default"
        sizes = f"{self.sizes.runs} runs × 2 pods × 4 GPUs, job controller's limits {limits}"
        row = compared("until all pods run", "plain Indexed Jobs and Services", sizes, sides, "s")
        rows = [at_most(row, CREATION if raised else CREATION_DEFAULT)]
        if raised:
            taken = plain(
                "processor time of the operator for a FineTune", percentile(processor, 50), "ms", sizes
            )
            rows.append(at_most(taken, CPU_MS))
        return rows

    def running(self) -> list[Row]:
        """Memory, processor and requests of the operator while many runs report."""
        count = self.sizes.running
        self._submit(partial(self._create, finetune_object, RUNS, n, ONE) for n in range(count))
        self._await_running(count)
        with reporting(self._addresses()) as trainers:
            wait_for("every run's report", lambda: trainers.heard() >= count, 120, every=0.5)
            requests, processor, began = self._writes(), self._processor_seconds(), time.monotonic()
            time.sleep(self.sizes.seconds)
            seconds = time.monotonic() - began
            share = (self._processor_seconds() - processor) / seconds
            written = (self._writes() - requests) / count / seconds * 60
            megabytes = self._process().memory_info().rss / 1e6
        self._remove(RUNS)
        sizes = f"{count:,} running, each reporting a step every 5 s, for {self.sizes.seconds:g} s"
        return [
            at_most(plain("memory of the operator with runs that report", megabytes, "MB", sizes), MEMORY_MB),
            at_most(plain("share of a core with runs that report", share, "cores", sizes), CPU_SHARE),
            at_most(plain("writes of the operator for a run that reports", written, "a minute", sizes), 1),
        ]

    def changes(self) -> list[Row]:
        """From the end of a Job to the status, and from the end of a rank to the pods of the next attempt."""
        told: list[float] = []
        again: list[float] = []
        self._submit(partial(self._change, number, told, again) for number in range(self.sizes.changes))
        self._remove(RUNS)
        sizes = f"{self.sizes.changes} runs of 2 pods, {SUBMITTERS} at a time"
        return [
            at_most(
                plain("a Job's failure to the status, p99", percentile(told, 99), "s", sizes), JOB_SECONDS
            ),
            at_most(
                plain("a rank's failure to all pods of the next attempt, longest", max(again), "s", sizes),
                RESTART_SECONDS,
            ),
        ]

    def _change(self, number: int, told: list[float], again: list[float]) -> None:
        """A rank of one run fails."""
        name = run_name(number)
        self._create(finetune_object, RUNS, number, {})
        first = self._pods_of(name, 1)
        self._phase(name, "Running")
        began = time.monotonic()
        self._fail(first[0])
        self._await_failed(f"{name}-1")
        failed = time.monotonic()
        wait_for("the status", partial(self._ended, name), 60, every=0.01)
        told.append(time.monotonic() - failed)
        self._pods_of(name, 2)
        again.append(time.monotonic() - began)

    def cold_start(self) -> list[Row]:
        """An operator that finds many finished runs; it is not running before."""
        count = self.sizes.finished
        self._submit(partial(self._finished, n) for n in range(count))
        with self.operator.running():
            # Their statuses become what an operator has written.
            self._await_passes()
        began = time.monotonic()
        with self.operator.running():
            wait_for("readiness", self._ready, 300, every=0.1)
            self._await_passes()
            seconds, written = time.monotonic() - began, self._writes()
        sizes = f"{count:,} FineTunes that have ended"
        return [
            at_most(plain("cold start, to the last first pass", seconds, "s", sizes), COLD_SECONDS),
            at_most(plain("writes at a cold start", written, "writes", sizes), 0),
        ]

    def _until_all_run(self, make: Any, path: str, count: int) -> float:
        began = time.monotonic()
        self._submit(partial(self._create, make, path, n, GPUS) for n in range(count))
        self._await_running(2 * count)
        return time.monotonic() - began

    def _create(self, make: Any, path: str, number: int, spec: dict[str, Any]) -> None:
        made = make(
            run_name(number), NAMESPACE, output={"persistentVolumeClaim": {"path": f"out-{number}"}}, **spec
        )
        for body in made if isinstance(made, list) else [made]:
            self.cluster.client.create(SERVICES if body["kind"] == "Service" else path, body)

    def _finished(self, number: int) -> None:
        self._create(finetune_object, RUNS, number, {})
        now = "2026-01-01T00:00:00Z"
        entry = {"reason": "Succeeded", "message": "", "lastTransitionTime": now, "status": "True"}
        status = {
            "phase": "Complete",
            "attempt": 1,
            "startTime": now,
            "completionTime": now,
            "attempts": [
                {"number": 1, "outcome": "Succeeded", "reason": "Succeeded", "startTime": now, "endTime": now}
            ],
            "conditions": [{"type": "Complete", **entry}],
        }
        self.cluster.client.merge(f"{RUNS}/{run_name(number)}/status", {"status": status})

    def _submit(self, tasks: Iterable[Any]) -> None:
        with ThreadPoolExecutor(SUBMITTERS) as pool:
            for done in [pool.submit(task) for task in tasks]:
                done.result()

    def _list(self, path: str) -> list[dict[str, Any]]:
        return list(self.cluster.client.get(f"{path}{'&' if '?' in path else '?'}resourceVersion=0")["items"])

    def _await_running(self, count: int) -> None:
        def look() -> bool:
            pods = self._list(PODS)
            return sum(pod["status"].get("phase") == "Running" for pod in pods) >= count

        wait_for(f"{count} pods", look, 600, every=0.2)

    def _remove(self, *paths: str) -> None:
        for path in paths:
            query = "?propagationPolicy=Background"
            self._submit(
                partial(self.cluster.client.delete, f"{path}/{body['metadata']['name']}{query}")
                for body in self._list(path)
            )
        for path in (*paths, JOBS, PODS):
            wait_for(f"nothing at {path}", lambda place=path: not self._list(place), 600, every=0.2)

    def _addresses(self) -> list[str]:
        return [pod["status"]["podIP"] for pod in self._list(PODS)]

    def _pods_of(self, name: str, attempt: int) -> list[dict[str, Any]]:
        selector = f"?labelSelector=yuan2.dev/finetune={name},yuan2.dev/attempt={attempt}"

        def look() -> list[dict[str, Any]]:
            pods = self.cluster.client.get(PODS + selector)["items"]
            return pods if len(pods) == 2 else []

        return wait_for(f"pods of attempt {attempt}", look, 60, every=0.02)

    def _phase(self, name: str, phase: str) -> None:
        wait_for(
            phase,
            lambda: self.cluster.client.get(f"{RUNS}/{name}").get("status", {}).get("phase") == phase,
            60,
        )

    def _fail(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        ended = {"exitCode": 1, "reason": "Error", "message": "boom"}
        entry = {
            "name": "pytorch",
            "image": "x",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": ended},
        }
        self.cluster.client.merge(
            f"{PODS}/{name}/status", {"status": {"phase": "Failed", "containerStatuses": [entry]}}
        )

    def _await_failed(self, job: str) -> None:
        def look() -> bool:
            conditions = self.cluster.client.get(f"{JOBS}/{job}").get("status", {}).get("conditions", ())
            return any(entry["type"] in ("Failed", "FailureTarget") for entry in conditions)

        wait_for("the Job's failure", look, 60, every=0.01)

    def _ended(self, name: str) -> bool:
        attempts = self.cluster.client.get(f"{RUNS}/{name}").get("status", {}).get("attempts", ())
        return bool(attempts) and any("outcome" in attempt or "reason" in attempt for attempt in attempts)

    def _process(self) -> psutil.Process:
        assert self.operator.process is not None
        return psutil.Process(self.operator.process.pid)

    def _processor_seconds(self) -> float:
        times = self._process().cpu_times()
        return float(times.user + times.system)

    def _writes(self) -> int:
        reads = ("get", "list", "proxy")
        return sum(count for (verb, _), count in self.operator.api_requests().items() if verb not in reads)

    def _await_passes(self) -> None:
        wait_for("a pass over each", lambda: self._passes() >= self.sizes.finished, 300, every=0.1)

    def _passes(self) -> float:
        text = self.operator.ask("/metrics")
        lines = [line for line in text.splitlines() if line.startswith("yuan2_operator_reconciles_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'result="ok"' in line)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.operator.ask("/readyz") == "ok\n"
        return False


def run_name(number: int) -> str:
    """Name of a run, and so of its pods."""
    return f"run-{number}"


def plain_job(name: str, namespace: str, **spec: Any) -> list[dict[str, Any]]:
    """Service and Indexed Job of the same pods, as a user would write them without the operator."""
    owner = Owner(KIND_FINETUNE, name, namespace, "none", 1)
    plan = plan_finetune(owner, spec_of(**spec), attempt=1, restarts=0, missing=(), default_image="x:1")
    assert isinstance(plan, FineTunePlan)
    made = [manifest for manifest in finetune_manifests(plan) if manifest["kind"] != "ConfigMap"]
    for manifest in made:
        del manifest["metadata"]["ownerReferences"]
        manifest["metadata"]["labels"] = {"app": name}
    job = next(manifest for manifest in made if manifest["kind"] == "Job")
    # Pods with the operator's labels would be the operator's.
    job["spec"]["template"]["metadata"] = {"labels": {"app": name}}
    return made


@dataclass
class Trainers:
    """What answers for the pods of rank 0, with a step every five seconds."""

    asked: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)

    def heard(self) -> int:
        """Pods that have been asked."""
        return len(self.asked)

    async def answer(self, request: web.Request) -> web.Response:
        """For the pod whose address was asked."""
        assert request.transport is not None
        self.asked.add(request.transport.get_extra_info("sockname")[0])
        step = int((time.monotonic() - self.began) / 5)
        return web.Response(text=progress_of("run", step=step, total=100_000).to_json())

    async def listen(self, addresses: list[str]) -> None:
        """At every address, until cancelled."""
        app = web.Application()
        app.add_routes([web.get("/progress", self.answer)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        for address in addresses:
            await web.TCPSite(runner, address, PORT_PROGRESS).start()
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


@contextlib.contextmanager
def reporting(addresses: list[str]) -> Iterator[Trainers]:
    """Every address answers /progress inside this context."""
    trainers, loop = Trainers(), asyncio.new_event_loop()
    task = loop.create_task(trainers.listen(addresses))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), daemon=True)
    thread.start()
    try:
        yield trainers
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=60)
        loop.close()
