"""What a pod's agent leaves behind when another pod has gone."""

from __future__ import annotations

import threading
from pathlib import Path

from yuan2_trainer.pod.agent import tell_loss
from yuan2_trainer.pod.workspace import Workspace, replace


def test_the_end_of_a_rank_here_is_told_rather_than_the_loss_that_it_caused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    late = threading.Timer(0.3, replace, (workspace.exits, '{"1": -9}'))
    late.start()
    tell_loss(workspace, "pod 0 has gone", patience=60)
    late.join()
    assert not workspace.lost_pod.exists()


def test_where_no_rank_ended_the_loss_is_told(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    tell_loss(workspace, "pod 0 has been silent", patience=0.1)
    assert workspace.lost_pod.read_text(encoding="utf-8") == "pod 0 has been silent"
