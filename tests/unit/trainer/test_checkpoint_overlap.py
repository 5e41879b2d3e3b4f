"""Checkpoints are written beside the training: from a copy, complete before they are told of."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from yuan2_core.host_memory import available_bytes
from yuan2_trainer.checkpoint import checkpoints as checkpoint
from yuan2_trainer.checkpoint import snapshot
from yuan2_trainer.checkpoint.background import Background
from yuan2_trainer.checkpoint.checkpoints import Checkpoints
from yuan2_trainer.checkpoint.fragments import Fragment
from yuan2_trainer.checkpoint.shards import ShardReader
from yuan2_trainer.checkpoint.snapshot import HostCopy
from yuan2_trainer.data.order import Position
from yuan2_trainer.pod.outcome import OutputFullError

FACTS = {"total_steps": 9, "stage": 0, "identity": {}}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    """What `checkpoint` needs of DeepSpeed's engine without ZeRO, in a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    module = torch.nn.Linear(8, 4)
    yield SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))
    dist.destroy_process_group()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 2, lambda _: None)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Shards are written once it is set."""
    event, write = threading.Event(), checkpoint._write_own_shard

    def wait_and_write(held: list[Fragment], partial: Path) -> object:
        assert event.wait(30)
        return write(held, partial)

    monkeypatch.setattr(checkpoint, "_write_own_shard", wait_and_write)
    return event


def change(engine: Any) -> None:
    with torch.no_grad():
        engine.module.weight += 1


def test_the_state_of_the_step_is_written_whatever_training_does_meanwhile(
    engine: Any, checkpoints: Checkpoints, gate: threading.Event
) -> None:
    before = engine.module.weight.detach().clone()
    checkpoints.save(engine, Position(step=3), FACTS)
    change(engine)
    gate.set()
    assert checkpoints.finish() == 3
    found = checkpoints.latest()
    assert found is not None
    assert torch.equal(ShardReader(found).full("weight"), before)


def test_a_checkpoint_is_told_of_only_once_it_has_its_name(
    engine: Any, checkpoints: Checkpoints, gate: threading.Event
) -> None:
    checkpoints.save(engine, Position(step=3), FACTS)
    assert checkpoints.completed() is None
    assert not (checkpoints.root / "step-000003").exists()
    gate.set()
    checkpoints.finish()
    assert checkpoints.completed() == 3
    assert (checkpoints.root / "step-000003" / "manifest.json").is_file()


def test_the_next_one_waits_and_surplus_ones_go(engine: Any, checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        checkpoints.save(engine, Position(step=step), FACTS)
    assert checkpoints.finish() == 4
    assert sorted(item.name for item in checkpoints.root.iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("ask", [Checkpoints.completed, Checkpoints.finish])
def test_a_full_volume_is_raised_where_training_asks(
    engine: Any,
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Checkpoints], int | None],
) -> None:
    checkpoints.save(engine, Position(step=1), FACTS)
    checkpoints.finish()

    def full(path: Path, fragments: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "write_shard", full)
    checkpoints.save(engine, Position(step=2), FACTS)
    thread = checkpoints._background._thread
    assert thread is not None
    thread.join()
    with pytest.raises(OutputFullError, match="no space left for a checkpoint"):
        ask(checkpoints)
    assert [item.name for item in checkpoints.root.iterdir()] == ["step-000001"]
    assert checkpoints.completed() == 1


def test_without_memory_for_a_copy_training_waits(
    engine: Any, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "available_bytes", lambda: 100)
    checkpoints.save(engine, Position(step=5), FACTS)
    assert checkpoints._background._thread is None
    assert checkpoints.completed() == 5


def test_on_demand_training_waits(engine: Any, checkpoints: Checkpoints) -> None:
    checkpoints.save(engine, Position(step=5), FACTS, overlap=False)
    assert checkpoints.completed() == 5


def test_memory_of_a_copy_is_used_again() -> None:
    views = {kind: torch.arange(3.0) for kind in ("master", "exp_avg", "exp_avg_sq")}
    copy = HostCopy()
    places = [copy.take([Fragment("a", 0, 3, views)])[0].views["master"].data_ptr() for _ in range(2)]
    assert places[0] == places[1] != views["master"].data_ptr()


def test_an_error_in_the_background_is_raised_once() -> None:
    background = Background()

    def fail() -> None:
        raise KeyError("x")

    background.start(fail)
    with pytest.raises(KeyError):
        background.wait()
    background.wait()
    background.start(lambda: None)
    background.wait()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5 << 20),
        ({"memory.max": "max"}, 5 << 20),
        (
            {"memory.max": "3000000", "memory.current": "1500000", "memory.stat": "inactive_file 500000\n"},
            2_000_000,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "2000000",
                "memory/memory.usage_in_bytes": "1500000",
                "memory/memory.stat": "inactive_file 7\nother 3\n",
            },
            500_007,
        ),
    ],
)
def test_free_memory_is_the_machines_or_what_the_limit_leaves(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9999 kB\nMemAvailable:    5120 kB\n")
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path, meminfo) == expected
    assert available_bytes(tmp_path / "none", tmp_path / "nothing") is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_not_asked_of_the_kernel_again() -> None:
    code = """
import resource
from yuan2_trainer.pod.host_memory import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, again = faults(), faults()
assert first > 10000 > 100 > again, (first, again)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
