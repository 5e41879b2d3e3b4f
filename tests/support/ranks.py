"""Ranks of the trainer without the launcher: forked from a server that has imported torch and DeepSpeed once.

Importing them takes ten seconds of a processor a process; forked ranks start in a fraction of one.
Everything else is as in a pod: the same preflight, the same `yuan2_trainer.rank`, the same files.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.support import processors
from tests.support.ports import free_port
from yuan2_core.contract import TrainJob
from yuan2_trainer.pod.outcome import Outcome
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.workspace import Workspace, replace

_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
_TOLD = (processors.VARIABLE, processors.CARELESS)
"""Variables of a test that its ranks see: forked from a server, they do not inherit this process's."""
_RANK = "yuan2_trainer.rank"
_PRELOAD = ["torch._dynamo", "deepspeed", "tests.support.preloaded"]


def _context() -> ForkServerContext:
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start_ranks(
    job: TrainJob, directory: Path, module: str = _RANK, more: tuple[str, ...] = ()
) -> tuple[Workspace, list[BaseProcess]]:
    """Prepare the data and start the ranks of a job; `directory` becomes their workspace.

    `module` may be another one that ends in the rank's `main`, with `more` arguments.
    """
    directory.mkdir(parents=True)
    workspace = Workspace(directory)
    replace(workspace.job, job.to_json())
    prepared = check_job(job, workspace, lambda: None)
    replace(workspace.prepared, prepared.model_dump_json())
    arguments = [str(directory), *more]
    return workspace, start_processes(module, arguments, directory, job.launch.processes_per_node)


def start_processes(module: str, arguments: list[str], directory: Path, world_size: int) -> list[BaseProcess]:
    """Start `main(arguments)` of a module as the ranks of one node; each one's log goes to `directory`."""
    port, context = free_port(), _context()
    told = {name: os.environ[name] for name in _TOLD if name in os.environ}
    ranks: list[BaseProcess] = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **told,
        }
        process = context.Process(target=_rank, args=(module, arguments, str(directory), environment))
        process.start()
        ranks.append(process)
    return ranks


def run_processes(
    module: str, arguments: list[str], directory: Path, world_size: int, seconds: float = 150
) -> list[int | None]:
    """Run `main(arguments)` of a module as ranks to their end; their exit codes, by rank."""
    directory.mkdir(parents=True)
    ranks = start_processes(module, arguments, directory, world_size)
    _join(ranks, directory, seconds)
    return [process.exitcode for process in ranks]


def run_ranks(
    job: TrainJob,
    directory: Path,
    seconds: float = 150,
    meanwhile: Callable[[], object] | None = None,
    module: str = _RANK,
    more: tuple[str, ...] = (),
) -> list[Outcome]:
    """Run the ranks of a job to their end; their outcomes, by rank.

    Each runs the `main` of `module`, with `more` arguments. `meanwhile` is called once they have started:
    long before their first step.
    """
    workspace, ranks = start_ranks(job, directory, module, more)
    if meanwhile is not None:
        meanwhile()
    _join(ranks, directory, seconds)
    outcomes = [Outcome.from_json(workspace.outcome(rank).read_text()) for rank in range(len(ranks))]
    for rank, (outcome, process) in enumerate(zip(outcomes, ranks, strict=True)):
        assert outcome.exit_code == process.exitcode, (rank, outcome, process.exitcode)
    return outcomes


def _join(ranks: list[BaseProcess], directory: Path, seconds: float) -> None:
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            for other in ranks:
                other.kill()
            raise TimeoutError(f"a rank did not end; see {directory}/rank-*.log")


def train(job: TrainJob, directory: Path) -> None:
    """Run the ranks of a job and expect them to complete."""
    for outcome in run_ranks(job, directory):
        assert outcome.exit_code == 0, outcome


def _rank(module: str, arguments: list[str], directory: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    log = os.open(f"{directory}/rank-{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    processors.answer_as_told()
    sys.exit(import_module(module).main(arguments))
