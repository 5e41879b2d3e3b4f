"""The directory through which the processes of one pod talk: small files, replaced whole.

A file is either absent or complete, so that no process ever waits for another one's lock, and a process
that died cannot leave a half-written message behind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths below one directory of a pod's own file system."""

    root: Path

    @property
    def job(self) -> Path:
        """The `TrainJob` as the ranks read it."""
        return self.root / "job.json"

    @property
    def samples(self) -> Path:
        """The prepared data: a `SampleStore`."""
        return self.root / "samples"

    @property
    def evaluation(self) -> Path:
        """Prepared data to evaluate on, where they come from a file of their own: another `SampleStore`."""
        return self.root / "evaluation"

    @property
    def held_out(self) -> Path:
        """Otherwise the samples of `samples` to evaluate on, int64 (`.npy`)."""
        return self.root / "held-out.npy"

    @property
    def training(self) -> Path:
        """And those that are left to train on."""
        return self.root / "training.npy"

    @property
    def prepared(self) -> Path:
        """Facts about the data; its presence tells the ranks that they may start."""
        return self.root / "prepared.json"

    @property
    def progress(self) -> Path:
        """The last `Snapshot` of rank 0."""
        return self.root / "progress.json"

    @property
    def stop(self) -> Path:
        """Present when the pod was asked to end (SIGTERM)."""
        return self.root / "stop"

    @property
    def exits(self) -> Path:
        """Exit codes of the ranks as torchrun saw them."""
        return self.root / "exits.json"

    @property
    def agent_error(self) -> Path:
        """Why torchrun itself gave up, if it did."""
        return self.root / "agent-error.txt"

    @property
    def lost_pod(self) -> Path:
        """Which other pod was lost, if that ended this one's ranks."""
        return self.root / "lost-pod.txt"

    def outcome(self, rank: int) -> Path:
        """How a rank ended, in its own words."""
        return self.root / f"outcome-{rank}.json"

    def outcomes(self) -> list[Path]:
        return sorted(self.root.glob("outcome-*.json"))

    def stacks(self, rank: int, pid: int) -> Path:
        """Where a rank writes its stacks when it is asked to."""
        return self.root / f"stacks-{rank}-{pid}.txt"

    def all_stacks(self) -> list[Path]:
        """Those of the ranks that can be asked, by rank."""
        return sorted(self.root.glob("stacks-*-*.txt"), key=lambda path: int(path.stem.split("-")[1]))


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_text(path: Path) -> str | None:
    """The content of a file, `None` while it is absent."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
