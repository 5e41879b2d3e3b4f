"""What may change between two attempts of one run."""

from __future__ import annotations

from typing import Final

FREE_TRAINING: Final = (
    "microBatchSize",
    "gradientAccumulationSteps",
    "gradientCheckpointing",
    "gradientCheckpointingEvery",
    "packing",
    "tf32",
)
"""Fields of `training` that may change between attempts: they decide how fast a step is and how many samples
it takes, not what is learned from which sample. With another number of ranks they keep the global batch."""
