"""What the launcher concludes from the files that its ranks leave."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.training import make_job
from yuan2_core.contract import PEERS_MISSING
from yuan2_trainer.pod.launcher import STOP_PATIENCE, Launcher
from yuan2_trainer.pod.outcome import Outcome
from yuan2_trainer.pod.workspace import Workspace, read_text, replace
from yuan2_trainer.reporting.progress import Snapshot


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    job = make_job(tmp_path / "m", tmp_path / "d", tmp_path / "o", processes=2)
    return Launcher(job, Workspace(tmp_path), rank=1, environment={}, started_at=time.monotonic())


def test_the_ranks_of_this_node_must_all_have_completed(launcher: Launcher) -> None:
    for rank in (2, 3):
        assert launcher._combined().exit_code == 1
        replace(launcher.workspace.outcome(rank), Outcome(0, "Complete", "done").to_json())
    assert launcher._combined().message == "done"


def test_exit_codes_of_torchrun_complete_the_picture(launcher: Launcher) -> None:
    replace(launcher.workspace.exits, json.dumps({"3": -9}))
    assert "rank 3 was ended by signal 9" in launcher._combined().message


def test_pods_that_do_not_find_each_other_are_told(launcher: Launcher) -> None:
    replace(launcher.workspace.agent_error, "DistNetworkError: timed out\nafter 900 s")
    outcome = launcher._combined()
    assert (outcome.exit_code, outcome.reason) == (1, PEERS_MISSING)
    assert "the pods did not find each other: DistNetworkError: timed out after 900 s" in outcome.message


@pytest.mark.parametrize(
    ("snapshot", "waited", "gives_up"),
    [
        (Snapshot(state="preparing"), 0.0, True),
        (Snapshot(state="training", last_step_at=-1.0), STOP_PATIENCE - 1, False),
        (Snapshot(state="training", last_step_at=-1.0), STOP_PATIENCE + 1, True),
        (Snapshot(state="training", last_step_at=-1.0, step_seconds=60.0), STOP_PATIENCE + 1, False),
        (Snapshot(state="training", last_step_at=1.0), STOP_PATIENCE + 1, False),
        (Snapshot(state="evaluating", last_step_at=-1.0), STOP_PATIENCE + 1, True),
        (Snapshot(state="saving", last_step_at=-1.0), STOP_PATIENCE + 1, False),
        (Snapshot(state="exporting", last_step_at=-1.0), STOP_PATIENCE + 1, False),
    ],
)
def test_a_rank_that_hangs_is_not_waited_for(
    launcher: Launcher, snapshot: Snapshot, waited: float, gives_up: bool
) -> None:
    asked_at = time.monotonic() - waited
    if snapshot.last_step_at is not None:
        snapshot = snapshot.model_copy(update={"last_step_at": asked_at + snapshot.last_step_at})
    replace(launcher.workspace.progress, snapshot.model_dump_json())
    assert launcher._gives_up_waiting(asked_at) is gives_up


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    assert read_text(tmp_path / "a") is None
    replace(tmp_path / "a", "one")
    replace(tmp_path / "a", "二")
    assert read_text(tmp_path / "a") == "二"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
