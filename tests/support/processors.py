"""Another kind of processor than this one, as far as DeepSpeed asks: which types its accelerator knows."""

from __future__ import annotations

import os

VARIABLE = "YUAN2_TEST_ACCELERATOR"
"""Types of half the size that DeepSpeed's accelerator knows in ranks that are started: `fp16,bf16`, `bf16`,
`none`; unset: those of this processor."""
CARELESS = "YUAN2_TEST_CARELESS"
"""Where the DeepSpeed of `careless_rank` forgets the type that was asked for: `zero.Init` or `initialize`."""


def answer_as_told() -> None:
    """Make the accelerator of this process answer what the variable says."""
    told = os.environ.get(VARIABLE)
    if told is None:
        return
    from deepspeed.accelerator import get_accelerator

    known = told.split(",")
    accelerator = type(get_accelerator())
    accelerator.is_bf16_supported = lambda _: "bf16" in known
    accelerator.is_fp16_supported = lambda _: "fp16" in known
