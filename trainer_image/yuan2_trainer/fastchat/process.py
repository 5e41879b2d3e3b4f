"""One process of `torchrun ... -m yuan2_trainer.fastchat`: a rank, and on each node the one that prepares.

There is no launcher here: torchrun, which the user started, starts the ranks. The first rank of each node
does what a pod's launcher does (checks, data, the workspace), the others wait for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from yuan2_core.contract import EXIT_INVALID, Launch, TrainJob
from yuan2_core.errors import UserError
from yuan2_trainer.fastchat.flags import PROGRAM, UsageError, parse
from yuan2_trainer.fastchat.mapping import Mapped, map_flags, with_defaults
from yuan2_trainer.fastchat.zero_file import ZeroSettings, map_zero_file, read_zero_file
from yuan2_trainer.model.deepspeed import prepare_environment
from yuan2_trainer.pod.ending import leave, settle
from yuan2_trainer.pod.logs import configure_logging
from yuan2_trainer.pod.outcome import JobError, PreemptedError
from yuan2_trainer.pod.parent import die_with_parent
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.workspace import Workspace, replace
from yuan2_trainer.rank import start_process_group, train

EXIT_USAGE = 2
"""The command line cannot be read (what argparse ends with)."""
PATIENCE = 10.0
"""Seconds that the other ranks let rank 0 say what is wrong: torchrun ends it when one of them ends first."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others, as the environment of torchrun (or `deepspeed`) says."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    under_torchrun: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Of this process; alone where no torchrun has started it.

        Raises:
            JobError: the nodes have different numbers of processes.
        """
        world_size = int(environment.get("WORLD_SIZE", 1))
        # The `deepspeed` launcher has a name of its own for the processes of a node.
        local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size)
        if world_size % local:
            raise JobError(
                f"{world_size} processes, {local} on this node: all nodes must have the same number"
            )
        return cls(
            int(environment.get("RANK", 0)),
            int(environment.get("LOCAL_RANK", 0)),
            world_size,
            local,
            "TORCHELASTIC_RUN_ID" in environment,
        )

    @property
    def node(self) -> int:
        return self.rank // self.local_world_size


def main(arguments: Sequence[str]) -> int:
    """Train as the flags say; returns an exit code only when they cannot be obeyed."""
    try:
        place = Place.of(os.environ)
    except JobError as error:
        return _refuse(str(error), EXIT_INVALID, 0)
    configure_logging(f"rank {place.rank}")
    try:
        mapped = read_command_line(arguments, place)
    except UsageError as error:
        return _refuse(str(error), EXIT_USAGE, place.rank)
    except UserError as error:
        return _refuse(str(error), EXIT_INVALID, place.rank)
    if place.rank == 0:
        for note in mapped.notes:
            print(f"{PROGRAM}: {note}", file=sys.stderr, flush=True)  # noqa: T201 - a program for a terminal
    return run(mapped.job, place)


def read_command_line(arguments: Sequence[str], place: Place) -> Mapped:
    """The job of a command line.

    Raises:
        UsageError: a flag or its value is none.
        UserError: the flags, the file of `--deepspeed` or the output directory contradict each other.
    """
    given = parse(arguments)
    flags = with_defaults(given)
    device = "cpu" if flags["use_cpu"] or flags["no_cuda"] or not _sees_gpu() else "cuda"
    zero = ZeroSettings()
    if flags["deepspeed"]:
        path = flags["deepspeed"]
        zero = map_zero_file(path, read_zero_file(path), flags, place.world_size)
    launch = Launch.model_validate(
        {
            "nodes": place.world_size // place.local_world_size,
            "processes_per_node": place.local_world_size,
            "device": device,
        }
    )
    mapped = map_flags(given, zero, launch)
    if not Path(mapped.job.model.path).is_dir():
        raise JobError(
            f"--model_name_or_path {flags['model_name_or_path']}: no such directory; nothing is downloaded, "
            "give the path of a model"
        )
    _refuse_foreign_checkpoints(Path(mapped.job.output))
    return mapped


def run(job: TrainJob, place: Place) -> int:
    """Train; ends the process with the exit code of the contract."""
    if place.under_torchrun:
        die_with_parent()
    join_alone(os.environ)
    workspaces: list[Workspace] = []
    outcome = settle(lambda: _work(job, place, workspaces))
    if place.local_rank == 0:
        for workspace in workspaces:
            shutil.rmtree(workspace.root, ignore_errors=True)
    leave(outcome)


def join_alone(environment: MutableMapping[str, str]) -> None:
    """What torchrun would have set, for a process that nobody started with it."""
    if "RANK" in environment:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def _work(job: TrainJob, place: Place, workspaces: list[Workspace]) -> str:
    prepare_environment(job.launch.device)
    start_process_group(job.launch.device, job.training.tf32)
    workspace = _share_workspace(place)
    workspaces.append(workspace)
    _listen_for_signals(workspace)
    if place.local_rank == 0:
        replace(workspace.job, job.to_json())
        prepared = check_job(job, workspace, lambda: _beat(workspace))
        replace(workspace.prepared, prepared.model_dump_json())
    else:
        _wait_for(workspace.prepared)
    return train(workspace)


def _share_workspace(place: Place) -> Workspace:
    """A directory of this node, made by its first rank and told to the others."""
    import torch.distributed as dist

    made = tempfile.mkdtemp(prefix="yuan2-") if place.local_rank == 0 else None
    told: list[tuple[int, str | None]] = [(0, None)] * place.world_size
    dist.all_gather_object(told, (place.node, made))
    root = next(path for node, path in told if node == place.node and path is not None)
    return Workspace(Path(root))


def _listen_for_signals(workspace: Workspace) -> None:
    def stop(number: int, _: FrameType | None) -> None:
        if not workspace.stop.exists():
            _LOG.info("%s: a checkpoint is written, then this run ends", signal.Signals(number).name)
        workspace.stop.touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _beat(workspace: Workspace) -> None:
    """Called while the data are prepared."""
    if workspace.stop.exists():
        raise PreemptedError("asked to end while the data were prepared")


def _wait_for(path: Path) -> None:
    """Until the node's first rank has prepared everything; torchrun ends this one if it fails."""
    while not path.exists():
        time.sleep(0.05)


def _refuse_foreign_checkpoints(output: Path) -> None:
    """FastChat's own checkpoints would be gone on from by its script; here they cannot be."""
    foreign = sorted(path.parent.name for path in output.glob("checkpoint-*/trainer_state.json"))
    if foreign:
        raise JobError(
            f"--output_dir {output}: {foreign[-1]} was written by transformers' Trainer, this trainer cannot "
            "go on from it; give another --output_dir"
        )


def _refuse(message: str, exit_code: int, rank: int) -> int:
    """One line on rank 0; the other ranks leave it the time to say it."""
    if rank == 0:
        print(f"{PROGRAM}: error: {message}", file=sys.stderr, flush=True)  # noqa: T201 - as above
    else:
        time.sleep(PATIENCE)
    return exit_code


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
