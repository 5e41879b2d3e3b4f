"""A rank whose loop has a clock of its own: on rank 0 each look at it is so many seconds later, on the others
it stands."""

from __future__ import annotations

import os
from functools import partial
from itertools import count, repeat


def main(arguments: list[str]) -> int:
    """`yuan2_trainer.rank` with the arguments WORKSPACE and SECONDS."""
    from yuan2_trainer import rank
    from yuan2_trainer.train import loop

    readings = count(step=float(arguments[1])) if os.environ["RANK"] == "0" else repeat(0.0)
    loop.Loop = partial(loop.Loop, clock=lambda: next(readings))  # type: ignore[misc,assignment]
    return rank.main(arguments[:1])
