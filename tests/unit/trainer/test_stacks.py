"""Ranks tell where they are by a signal, also while they hang, and of those that cannot it is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from yuan2_trainer.pod.stacks import read_stacks
from yuan2_trainer.pod.workspace import Workspace

HANGING = """
import sys, threading
from pathlib import Path
from yuan2_trainer.pod.stacks import write_on_signal
from yuan2_trainer.pod.workspace import Workspace

def wait_for_nobody():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

write_on_signal(Workspace(Path(sys.argv[1])), int(sys.argv[2]))
wait_for_nobody()
"""


def test_no_rank_has_started(tmp_path: Path) -> None:
    assert read_stacks(Workspace(tmp_path)) == "no rank has started yet\n"


def test_ranks_that_hang_say_where_and_a_stopped_one_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1, 2)]
    try:
        end = time.monotonic() + 60
        while len(workspace.all_stacks()) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[2].kill()
        ranks[2].wait()
        first, again = read_stacks(workspace), read_stacks(workspace)
        assert ranks[0].poll() is None, "asking has ended it"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for text in (first, again):
        _, hanging, stopped, ended = text.split("=== rank ")
        assert hanging.startswith(f"0 (pid {ranks[0].pid}) ===")
        assert hanging.count("in wait_for_nobody") == 1
        assert "the kernel says of it: T (stopped)" in stopped
        assert ended.strip().endswith("has ended")
