"""A rank that counts the numbers that ZeRO-3 gathers, in `gathered-RANK.txt` of its workspace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    """`yuan2_trainer.rank` with its arguments."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from yuan2_trainer import rank

    note = Path(arguments[0]) / f"gathered-{os.environ['RANK']}.txt"
    kind: Any = coordinator.PartitionedParameterCoordinator
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    real = getattr(kind, name)

    def counted(self: Any, params: Any, *more: Any, **options: Any) -> Any:
        away = [item for item in params if item.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        with note.open("a") as lines:
            lines.write(f"{sum(item.ds_numel for item in away)}\n")
        return real(self, params, *more, **options)

    setattr(kind, name, counted)
    return rank.main(arguments)
