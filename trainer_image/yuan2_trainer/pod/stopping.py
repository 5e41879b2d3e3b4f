"""All ranks stop between the same two micro batches when any pod is asked to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class AskedToEndError(Exception):
    """Some rank's pod was asked to end; all ranks raise it at the same place, and the weights are those of
    the last whole optimizer step."""


class Vote:
    """The ranks' agreement on whether to go on; made by all of them together.

    It is taken among processors: asking on GPUs would wait for all that they have been given to compute.
    """

    def __init__(self, asked_to_end: Callable[[], bool]) -> None:
        self.asked_to_end = asked_to_end
        self._group: Any = dist.new_group(backend="gloo")

    def take(self, busy: bool = True) -> bool:
        """Whether any rank is busy.

        Raises:
            AskedToEndError: on all ranks alike.
        """
        answers = torch.tensor([float(self.asked_to_end()), float(busy)])
        dist.all_reduce(answers, group=self._group)
        asked, working = answers.tolist()
        if asked:
            raise AskedToEndError
        return bool(working)
