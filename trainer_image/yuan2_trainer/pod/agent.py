"""torchrun in a process of its own: starts the ranks of this node and tells how each one ended.

It is torchrun's own `parse_args`/`config_from_args`/`elastic_launch`, which read the `PET_*` variables of
the pod, and not its command line, because that turns every child's exit code into 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from yuan2_trainer.pod.lifeline import Lifeline, Watch
from yuan2_trainer.pod.parent import PARENT, die_with_parent
from yuan2_trainer.pod.workspace import Workspace, replace

JOINING_SECONDS = 900
"""torchrun's own time-out, where no other is given."""
OWN_END_SECONDS = 3.0
"""torchrun looks after its ranks ten times a second; then it ends those that are left."""


def main(arguments: list[str]) -> int:
    """Run `yuan2_trainer.rank` under torchrun; `arguments` are the workspace and torchrun's own options."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())  # of the ranks
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    workspace = Workspace(Path(arguments[0]))
    options = parse_args([*arguments[1:], "--max-restarts=0", "-m", "yuan2_trainer.rank", arguments[0]])
    config, command, command_arguments = config_from_args(options)
    joining = timedelta(seconds=int(config.rdzv_configs.get("timeout", JOINING_SECONDS)))
    lifeline = _lifeline(options, config.max_nodes, workspace, joining)
    well = False
    try:
        elastic_launch(config, command)(*command_arguments)
        well = True
    except ChildFailedError as error:
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        replace(workspace.exits, json.dumps(codes))
        return 1
    except Exception as error:
        replace(workspace.agent_error, f"{type(error).__name__}: {error}")
        raise
    finally:
        if lifeline is not None:
            lifeline.end(well)
    return 0


def tell_loss(workspace: Workspace, loss: str, patience: float = OWN_END_SECONDS) -> None:
    """Leave word that another pod has gone, unless a rank of this one ended first: then that is the word.

    The others may notice the end of a rank here, and go, before torchrun here has told of it.
    """
    until = time.monotonic() + patience
    while not workspace.exits.exists() and time.monotonic() < until:
        time.sleep(0.05)
    if not workspace.exits.exists():
        replace(workspace.lost_pod, loss)


def _lifeline(options: Any, nodes: int, workspace: Workspace, joining: timedelta) -> Lifeline | None:
    """The watch over the other pods, where there are any."""
    if nodes == 1:
        return None

    def end(loss: str) -> None:
        tell_loss(workspace, loss)
        os._exit(1)  # the kernel kills the ranks with it

    watch = Watch(options.node_rank, nodes)
    made = Lifeline(options.master_addr, options.master_port, watch, end, joining)
    made.start()
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
