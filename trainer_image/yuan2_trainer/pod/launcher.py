"""The pod's main process: checks the job, starts the ranks, answers for them, and says how it ended."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from yuan2_core.contract import (
    EXIT_COMPLETE,
    EXIT_CRASHED,
    EXIT_PREEMPTED,
    PEER_LOST,
    PEERS_MISSING,
    Launch,
    Progress,
    TrainJob,
    TrainState,
)
from yuan2_core.processors import available_cpus, threads_per_process
from yuan2_trainer.pod.outcome import (
    JobError,
    Outcome,
    combine,
    describe_validation,
    outcome_of,
    write_termination,
)
from yuan2_trainer.pod.parent import PARENT
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.stacks import read_stacks
from yuan2_trainer.pod.workspace import Workspace, read_text, replace
from yuan2_trainer.reporting.progress import Tracker, progress_at, read_snapshot
from yuan2_trainer.reporting.progress_server import ProgressServer

STOP_PATIENCE = 30.0
"""Seconds that a rank is given to come to the end of a step after SIGTERM, or three recent steps if that is
longer."""
_POLL_SECONDS = 0.1
_LOG = logging.getLogger(__name__)


class RanksGoneError(Exception):
    """The ranks ended while the data were being prepared."""


class StopRequestedError(Exception):
    """SIGTERM came while the data were being prepared."""


def load_job(path: Path) -> TrainJob:
    """Read and check a job, or the job of a run from the record that it left in its output.

    Raises:
        JobError: the file cannot be read, or a field in it is wrong.
    """
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and isinstance(document.get("job"), dict):
            document = document["job"]
        return TrainJob.model_validate(document)
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise JobError(f"{path}: {describe_validation(error)}") from error
    except ValueError as error:
        raise JobError(f"{path} is not JSON: {error}") from error


def node_rank(environment: Mapping[str, str]) -> int:
    """This pod's rank, as PyTorchJob gives it; 0 where there is no such environment."""
    return int(environment.get("PET_NODE_RANK") or environment.get("RANK") or 0)


def torchrun_options(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """torchrun's options: those of the pod's environment, which must agree with the job, or those of one
    node.

    Raises:
        JobError: the environment describes other processes than the job.
    """
    for name, wanted in (("PET_NNODES", launch.nodes), ("PET_NPROC_PER_NODE", launch.processes_per_node)):
        given = environment.get(name)
        if given is not None and given != str(wanted):
            raise JobError(f"launch: {name} is {given}, the job says {wanted}; do not set it in workers.env")
    options = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes_per_node}"]
    if "MASTER_ADDR" in environment or "PET_MASTER_ADDR" in environment:
        address = environment.get("PET_MASTER_ADDR") or environment["MASTER_ADDR"]
        port = environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT") or "29500"
        return [
            *options,
            f"--node-rank={node_rank(environment)}",
            f"--master-addr={address}",
            f"--master-port={port}",
            f"--rdzv-conf=timeout={launch.rendezvous_seconds}",
        ]
    if launch.nodes > 1:
        raise JobError(
            f"launch.nodes is {launch.nodes}, but MASTER_ADDR is not set: "
            "start it with PyTorchJob's environment"
        )
    return [*options, "--master-addr=127.0.0.1", f"--master-port={_free_port()}"]


@dataclass
class Launcher:
    """One attempt on one node."""

    job: TrainJob
    workspace: Workspace
    rank: int
    environment: dict[str, str]
    started_at: float
    agent: subprocess.Popen[bytes] | None = None
    stop_asked_at: float | None = None

    def run(self) -> tuple[Outcome, Progress]:
        """Everything from the first check to the last rank's end."""
        replace(self.workspace.job, self.job.to_json())
        tracker = Tracker(self.workspace)
        tracker.update(state="preparing")
        server = self._serve()
        self._listen_for_signals()
        try:
            outcome = self._train(tracker)
        except Exception as error:  # noqa: BLE001 - every end becomes an outcome
            outcome = outcome_of(error)
            if not isinstance(error, ValueError):
                _LOG.exception("the launcher failed")
        finally:
            self._end_agent()
            if server is not None:
                server.close()
        return outcome, self._last_progress(outcome)

    def progress(self) -> Progress:
        """What is known now."""
        snapshot = read_snapshot(self.workspace)
        return progress_at(snapshot, self.job.name, self.job.attempt, self.started_at, time.monotonic())

    def _train(self, tracker: Tracker) -> Outcome:
        self._start_agent()
        try:
            prepared = check_job(self.job, self.workspace, self._beat)
        except StopRequestedError:
            return _stopped_early()
        except RanksGoneError:
            return self._combined()
        tracker.update(state="loading")
        replace(self.workspace.prepared, prepared.model_dump_json())
        _LOG.info(
            "%d sequences, %d tokens, the longest %d; %d dropped; %d to evaluate on",
            prepared.samples,
            prepared.tokens,
            prepared.longest,
            prepared.dropped_samples,
            prepared.eval_samples,
        )
        return self._wait_for_ranks()

    def _start_agent(self) -> None:
        options = torchrun_options(self.job.launch, self.environment)
        command = [sys.executable, "-m", "yuan2_trainer.pod.agent", str(self.workspace.root), *options]
        environment = {name: value for name, value in self.environment.items() if not name.startswith("PET_")}
        processes = self.job.launch.processes_per_node
        threads = threads_per_process(available_cpus(), processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment[PARENT] = str(os.getpid())
        # A session of its own: a terminal's Ctrl-C reaches the launcher alone, which asks the ranks to stop.
        self.agent = subprocess.Popen(command, env=environment, start_new_session=True)

    def _wait_for_ranks(self) -> Outcome:
        assert self.agent is not None
        while self.agent.poll() is None:
            if self.stop_asked_at is not None and self._gives_up_waiting(self.stop_asked_at):
                return _stopped_early()
            time.sleep(_POLL_SECONDS)
        return self._combined()

    def _gives_up_waiting(self, asked_at: float) -> bool:
        """Before the first step there is nothing to save; later a rank that hangs must not use up the grace
        period."""
        snapshot = read_snapshot(self.workspace)
        if snapshot.state in ("starting", "preparing", "loading"):
            return True
        patience = max(STOP_PATIENCE, 3 * (snapshot.step_seconds or 0.0))
        stuck = snapshot.last_step_at is None or snapshot.last_step_at < asked_at
        return (
            snapshot.state in ("training", "evaluating") and stuck and time.monotonic() - asked_at > patience
        )

    def _beat(self) -> None:
        """Called during preparation."""
        if self.stop_asked_at is not None:
            raise StopRequestedError
        if self.agent is not None and self.agent.poll() is not None:
            raise RanksGoneError

    def _combined(self) -> Outcome:
        outcomes = {
            int(path.stem.rpartition("-")[2]): Outcome.from_json(path.read_text(encoding="utf-8"))
            for path in self.workspace.outcomes()
        }
        codes = {
            int(rank): code for rank, code in json.loads(read_text(self.workspace.exits) or "{}").items()
        }
        lost = read_text(self.workspace.lost_pod)
        if lost is not None and all(end.exit_code == EXIT_COMPLETE for end in outcomes.values()):
            return Outcome(EXIT_CRASHED, PEER_LOST, f"lost contact with another rank: {lost}")
        trouble = read_text(self.workspace.agent_error)
        if trouble is not None and not outcomes:
            words = " ".join(trouble.split())
            return Outcome(EXIT_CRASHED, PEERS_MISSING, f"the pods did not find each other: {words}")
        first = self.rank * self.job.launch.processes_per_node
        return combine(outcomes, codes, range(first, first + self.job.launch.processes_per_node))

    def _serve(self) -> ProgressServer | None:
        """Node 0 answers for the run, the others for the stacks of their ranks."""
        if self.rank == 0:
            server = ProgressServer(self.job.progress_port, self.progress, self._stacks)
            server.start()
            return server
        try:
            server = ProgressServer(self.job.progress_port + 1, None, self._stacks)
        except OSError as error:
            _LOG.warning("nobody can ask this pod for stacks: port %d: %s", self.job.progress_port + 1, error)
            return None
        server.start()
        return server

    def _stacks(self) -> str:
        text = read_stacks(self.workspace)
        _LOG.warning("asked where the ranks are:\n%s", text)
        return text

    def _listen_for_signals(self) -> None:
        def stop(number: int, _: FrameType | None) -> None:
            _LOG.info("%s: the ranks are asked to save and end", signal.Signals(number).name)
            self.stop_asked_at = self.stop_asked_at or time.monotonic()
            self.workspace.stop.touch()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _end_agent(self) -> None:
        """Kill the agent if it still runs; the kernel kills the ranks with it."""
        if self.agent is not None and self.agent.poll() is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
            self.agent.wait()

    def _last_progress(self, outcome: Outcome) -> Progress:
        states: dict[int, TrainState] = {EXIT_COMPLETE: "complete", EXIT_PREEMPTED: "preempted"}
        last = self.progress()
        return last.model_copy(
            update={"state": states.get(outcome.exit_code, "failed"), "message": outcome.message}
        )


def run(job_path: Path, termination_log: Path, output: Path | None = None) -> int:
    """Run one attempt, into another directory than the job's if `output` is one; returns the pod's exit
    code."""
    started_at = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="yuan2-"))
    progress: Progress | None = None
    try:
        job = load_job(job_path)
        if output is not None:
            job = job.model_copy(update={"output": str(output)})
        environment = dict(os.environ)
        launcher = Launcher(job, Workspace(root), node_rank(environment), environment, started_at)
        outcome, progress = launcher.run()
    except JobError as error:
        outcome = outcome_of(error)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    write_termination(termination_log, outcome, progress)
    level = logging.INFO if outcome.exit_code == EXIT_COMPLETE else logging.ERROR
    _LOG.log(level, "%s: %s", outcome.reason, outcome.message)
    return outcome.exit_code


def _stopped_early() -> Outcome:
    return Outcome(
        EXIT_PREEMPTED,
        "Preempted",
        "asked to end before a new checkpoint could be written; the next attempt goes on from the last one",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
