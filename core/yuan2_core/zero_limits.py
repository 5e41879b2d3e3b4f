"""What ZeRO-3 may hold of other ranks' parameters, by the size of the model. Pure.

The trainer gives these numbers to DeepSpeed, and the estimate counts the memory that they take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LIVE_PARAMETERS: Final = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters` and `stage3_max_reuse_distance`."""
PREFETCH_BUCKET: Final = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`."""
PERSISTENCE_THRESHOLD: Final = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`."""
_LIVE_LAYERS: Final = 2.5
"""Between a weight's use in the recomputation of a layer and in its backward pass lie less than two layers'
worth of other uses; the rest is room to gather ahead."""
_PERSISTENT_ROWS: Final = 32
"""Matrices of a LoRA adapter up to this rank beside a side of the hidden size, or of 8 beside one of four
times that, stay whole: gathering such a small one costs a message's latency and saves nothing."""


@dataclass(frozen=True)
class Zero3Limits:
    """Numbers (not bytes) of parameters.

    Attributes:
        live: gathered at most before the next ones are waited for, and kept if they are used again within as
            many (`stage3_max_live_parameters`, `stage3_max_reuse_distance`).
        prefetch: gathered ahead at once (`stage3_prefetch_bucket_size`).
        persistent: a parameter of fewer is never cut (`stage3_param_persistence_threshold`).
    """

    live: int
    prefetch: int
    persistent: int


def zero_3_limits(hidden: int, layer: int) -> Zero3Limits:
    """DeepSpeed's defaults, but for models whose layers are too large for them.

    With 10^9 live parameters and a layer of 1.2 * 10^9 (51B and 102B), DeepSpeed lets go of a part of each
    layer that it has computed again before the layer's backward pass, and gathers that part once more.

    Args:
        hidden: hidden size of the model.
        layer: weights of one of its layers.
    """
    return Zero3Limits(
        live=max(LIVE_PARAMETERS, int(_LIVE_LAYERS * layer)),
        prefetch=PREFETCH_BUCKET,
        persistent=max(PERSISTENCE_THRESHOLD, _PERSISTENT_ROWS * hidden),
    )
