"""An output volume that fills up while a checkpoint is written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job
from yuan2_trainer.pod.outcome import OutputFullError
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.workspace import Workspace

MEGABYTE = 1 << 20


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    target = tmp_path / "volume"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={16 * MEGABYTE}", "tmpfs", str(target)], check=True)
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.mark.root
def test_a_full_volume_is_named_and_the_last_checkpoint_still_loads(
    small_volume: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = small_volume / "output"
    job = make_job(*inputs, output, every_steps=1, max_steps=9)

    def somebody_else_writes() -> None:
        free = shutil.disk_usage(small_volume).free
        (small_volume / "ballast").write_bytes(bytes(free - 3 * MEGABYTE))

    outcome = run_ranks(job, tmp_path / "first", meanwhile=somebody_else_writes)[0]
    assert outcome.exit_code == 78
    assert outcome.reason == "OutputFull"
    assert str(output / "checkpoints") in outcome.message
    assert "GB free" in outcome.message
    names = sorted(item.name for item in (output / "checkpoints").iterdir())
    assert names
    assert all(not name.endswith(".partial") for name in names)

    (small_volume / "ballast").unlink()
    train(job, tmp_path / "second")
    assert f"going on from {names[-1]}" in (tmp_path / "second" / "rank-0.log").read_text()
    assert len(losses(output)) == 9


@pytest.mark.root
def test_a_volume_that_will_be_too_small_is_named_before_the_training(
    small_volume: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    job = make_job(*inputs, small_volume / "output", every_steps=1, max_steps=90, keep=50)
    with pytest.raises(
        OutputFullError, match=r"the run needs .*: 52 checkpoints of .* lower checkpoint.keep"
    ):
        check_job(job, Workspace(tmp_path), lambda: None)
