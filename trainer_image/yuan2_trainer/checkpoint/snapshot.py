"""A copy of the optimizer's numbers in host memory, which can be written while training changes them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from yuan2_core.host_memory import available_bytes
from yuan2_trainer.checkpoint.fragments import KINDS, Fragment

SHARE_OF_FREE_MEMORY = 0.5
"""Of what is free, so much may be taken by the copies of all processes of a node."""


class HostCopy:
    """Copies fragments into memory that is taken at the first copy and used again for the following ones."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment] | None:
        """The fragments as they are now, in fp32; None where memory does not allow a copy."""
        needed = len(KINDS) * sum(fragment.numel for fragment in fragments)
        if self._buffer is None or self._buffer.numel() < needed:
            self._buffer = None
            if not _fits(4 * needed):
                return None
            on_gpu = any(view.is_cuda for fragment in fragments for view in fragment.views.values())
            self._buffer = torch.empty(needed, dtype=torch.float32, pin_memory=on_gpu)
        copies = _copied(fragments, self._buffer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _copied(fragments: Sequence[Fragment], buffer: Tensor) -> list[Fragment]:
    copies, place = [], 0
    for fragment in fragments:
        views = {}
        for kind in KINDS:
            views[kind] = buffer[place : place + fragment.numel]
            views[kind].copy_(fragment.views[kind].detach(), non_blocking=True)
            place += fragment.numel
        copies.append(Fragment(fragment.name, fragment.start, fragment.numel, views))
    return copies


def _fits(size: int) -> bool:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = available_bytes()
    return free is not None and size * processes <= SHARE_OF_FREE_MEMORY * free
