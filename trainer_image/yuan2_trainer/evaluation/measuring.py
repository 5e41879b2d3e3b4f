"""How a run is judged on data that it does not train on.

The loss is the mean over the labelled tokens of all held-out data, so that neither the number of ranks nor
the shape of a batch changes it. The model is in evaluation mode meanwhile, without dropout, and nothing that
training depends on is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from yuan2_trainer.data.holdout import HeldOut
from yuan2_trainer.data.order import share_of_rank
from yuan2_trainer.data.packing import Row
from yuan2_trainer.pod.stopping import Vote
from yuan2_trainer.reporting.progress import Tracker
from yuan2_trainer.train.step import Stepper


@dataclass
class Pulse:
    """What a rank does between two pieces of work: all ranks agree whether to go on, and this one tells that
    it is alive."""

    vote: Vote
    tracker: Tracker | None = None

    def beat(self, busy: bool = True) -> bool:
        """As `Vote.take`."""
        working = self.vote.take(busy)
        if self.tracker is not None:
            self.tracker.beat()
        return working


@contextmanager
def evaluating(engine: Any) -> Iterator[Any]:
    """The model, in evaluation mode and without gradients, and back in training mode afterwards.

    It is called itself and not through the engine, which counts passes and profiles the ones of training.
    """
    engine.eval()
    try:
        with torch.no_grad():
            yield engine.module
    finally:
        engine.train()


@dataclass
class Evaluator:
    """Computes the loss on held-out data; all ranks together."""

    stepper: Stepper
    """Of training: batches are cut and packed as there."""
    held_out: HeldOut

    def measure(self, pulse: Pulse) -> tuple[float, dict[str, float] | None]:
        """The mean loss over labelled tokens, or over comparisons, and then what answers are worth.

        Raises:
            AskedToEndError: before it was complete.
        """
        indices, context = self.held_out.indices, self.own_stepper.begin(self.held_out.indices)
        total = torch.zeros(1, dtype=torch.float64, device=self.stepper.device)
        with evaluating(self.stepper.engine) as model:
            for rows in self._share:
                pulse.beat()
                # As in training, a rank with nothing left takes part with a sample that does not count:
                # ZeRO-3 gathers weights in every pass.
                used = self.own_stepper.filler(indices) if rows is None else rows
                sums = self.own_stepper.micro_sums(used, context, model).double()
                total = total + (sums * 0.0 if rows is None else sums)
        dist.all_reduce(total)
        found = total.tolist()
        return found[0] / self.own_stepper.units(indices), self.own_stepper.rewards(found, context)

    @cached_property
    def own_stepper(self) -> Stepper:
        """That of training, over the held-out data."""
        return self.stepper.over(self.held_out.store)

    @cached_property
    def _share(self) -> list[list[Row] | None]:
        """This rank's micro batches; every rank has as many."""
        cut = self.own_stepper.cut(self.held_out.indices)
        return share_of_rank(cut, dist.get_rank(), dist.get_world_size())
