"""A rank to which something happens when it begins to export."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    """`yuan2_trainer.rank` with the arguments WORKSPACE and what happens.

    `memory=BYTES`: it may take no more private memory than so much beside what it has; `hoard=1`: it reads
    all weights before it writes; `stop=BEATS`: it is asked to end after so many tensors; `shard=BYTES`: of a
    file.
    """
    from yuan2_core.conflicts import adapter_of
    from yuan2_model.dimensions import tensor_shapes
    from yuan2_trainer import rank
    from yuan2_trainer.checkpoint import export
    from yuan2_trainer.model.published import PublishedWeights

    wishes = dict(argument.split("=") for argument in arguments[1:])

    class Disturbed(export.Export):
        def write(self) -> str:
            object.__setattr__(self, "max_shard_size", int(wishes.get("shard", self.max_shard_size)))
            if "stop" in wishes:
                object.__setattr__(
                    self, "beat", _stopping(self.beat, int(wishes["stop"]), Path(arguments[0]))
                )
            if "memory" in wishes:
                _limit(int(wishes["memory"]))
            if "hoard" in wishes:
                weights = PublishedWeights(self.engine.module, adapter_of(self.job.method))
                names = tensor_shapes(self.engine.module.config.dimensions())
                assert [weights.read(name) for name in names]
            return super().write()

    export.Export = Disturbed  # type: ignore[misc]
    return rank.main(arguments[:1])


def _stopping(beat: Any, after: int, workspace: Path) -> Any:
    beats = 0

    def counted() -> None:
        nonlocal beats
        beats += 1
        if beats == after:
            (workspace / "stop").touch()
        beat()

    return counted


def _limit(more: int) -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, now + more))
