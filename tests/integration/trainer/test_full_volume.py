"""An output volume that fills up while a checkpoint is written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job

MEGABYTE = 1 << 20


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    target = tmp_path / "volume"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * MEGABYTE}", "tmpfs", str(target)], check=True)
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.mark.root
def test_a_full_volume_is_named_and_the_last_checkpoint_still_loads(
    small_volume: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = small_volume / "output"
    job = make_job(*inputs, output, every_steps=1, max_steps=9)
    outcome = run_ranks(job, tmp_path / "first")[0]
    assert outcome.exit_code == 78
    assert outcome.reason == "OutputFull"
    assert str(output / "checkpoints") in outcome.message
    assert "GB free" in outcome.message
    names = sorted(item.name for item in (output / "checkpoints").iterdir())
    assert names
    assert all(not name.endswith(".partial") for name in names)

    subprocess.run(["mount", "-o", f"remount,size={64 * MEGABYTE}", str(small_volume)], check=True)
    train(job, tmp_path / "second")
    assert f"going on from {names[-1]}" in (tmp_path / "second" / "rank-0.log").read_text()
    assert len(losses(output)) == 9
