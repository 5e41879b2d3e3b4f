"""One optimizer step: the micro batches of a rank, and the numbers all ranks agree on afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from yuan2_model.rows import prepare_rows
from yuan2_trainer.checkpoint.fragments import inner_optimizer
from yuan2_trainer.data.collate import collate
from yuan2_trainer.data.families import families, work_of
from yuan2_trainer.data.order import Indices, share_of_rank
from yuan2_trainer.data.packing import Row, cut_batch
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.pod.stopping import Vote
from yuan2_trainer.reporting.mfu import memory_bytes


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks."""

    loss: float
    """Mean over the labelled tokens of the global batch."""
    grad_norm: float
    """2-norm of the gradient of that loss, before clipping."""
    stop: bool
    """Some rank was asked to end."""
    save: bool
    """Rank 0 wants a checkpoint."""
    tokens: int
    """Of all samples."""
    labelled_tokens: int
    computed_tokens: int
    """A beginning that samples share counts once."""
    attention_pairs: int
    """(query, key) pairs that attention looks at in a layer."""
    memory_bytes: int
    """Highest memory of a rank so far."""
    applied: bool
    """Whether it changed the weights; a step whose gradient is not finite is skipped."""
    rewards: dict[str, float] | None = None
    """What answers are worth to the model, where they are compared."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; DeepSpeed says -1 for the norm of a gradient that is not."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and self.grad_norm >= 0


class Wishes(NamedTuple):
    """What a rank wants to happen at the end of a step."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Stepper:
    """Takes global batches through the engine.

    The loss of a global batch is the mean over its labelled tokens, on whatever rank and in whatever micro
    batch they are. Their number is known before the step, so each micro batch contributes `sum of its
    losses / that number`; DeepSpeed averages gradients over ranks and accumulation steps, which the factor
    `world size * accumulation steps` undoes.
    """

    engine: Any
    store: SampleStore
    device: torch.device
    micro_batch_size: int
    accumulation_steps: int
    pad_id: int
    max_length: int
    max_grad_norm: float
    packing: bool
    vote: Vote | None = None
    """Taken between two micro batches; `None`: a step is not interrupted."""

    def over(self, store: SampleStore) -> Stepper:
        """The same over other samples."""
        return replace(self, store=store)

    def run(self, batch: Indices, learning_rate: float, wishes: Callable[[], Wishes] = Wishes) -> StepResult:
        """One optimizer step over the samples `batch` of all ranks.

        Args:
            batch: of all ranks.
            learning_rate: of this step.
            wishes: this rank's, asked for when it has done its part; of `save` only rank 0's count.

        Raises:
            AskedToEndError: some pod was asked to end before the last micro batch; nothing has changed but
                gradients.
        """
        units, context = self.units(batch), self.begin(batch)
        local_sums = self._accumulate(batch, units, context)
        for group in inner_optimizer(self.engine).param_groups:
            group["lr"] = learning_rate
        own_norm = self._clip_without_zero()
        applied = self._apply(own_norm)
        sums, wanted, memory = self._agree(local_sums, wishes())
        norm = float(self.engine.get_global_grad_norm() if own_norm is None else own_norm)
        computed, pairs = self._work(batch)
        return StepResult(
            loss=sums[0] / max(1, units),
            grad_norm=norm,
            stop=wanted.stop,
            save=wanted.save,
            tokens=int(self.store.lengths[batch].sum()),
            labelled_tokens=int(self.store.labelled[batch].sum()),
            computed_tokens=computed,
            attention_pairs=pairs,
            memory_bytes=int(memory),
            applied=applied,
            rewards=self.rewards(sums, context),
        )

    def units(self, batch: Indices) -> int:
        """What the loss of a batch is the mean over: its labelled tokens."""
        return int(self.store.labelled[batch].sum())

    def begin(self, batch: Indices) -> Any:  # noqa: ARG002 - comparisons want it
        """What is known of a whole batch before its first micro batch; handed to `micro_sums`."""
        return None

    def rewards(
        self,
        sums: list[float],  # noqa: ARG002 - comparisons want them
        context: Any,  # noqa: ARG002
    ) -> dict[str, float] | None:
        """What answers are worth to the model, from the sums of all ranks."""
        return None

    def filler(self, batch: Indices) -> list[Row]:
        """Rows for a rank that has nothing left."""
        return [batch[:1]]

    def _apply(self, own_norm: Tensor | None) -> bool:
        """Change the weights, unless the gradient is not finite: without ZeRO, DeepSpeed asks nobody."""
        if own_norm is not None and not math.isfinite(own_norm):
            self.engine.module.zero_grad(set_to_none=True)
            return False
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def _work(self, batch: Indices) -> tuple[int, int]:
        """Tokens computed for a batch, and pairs of its attention."""
        if self.packing:
            return work_of(families(batch, self.store, self.max_length), self.store)
        lengths = self.store.lengths[batch].astype(np.int64)
        return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())

    def _accumulate(self, batch: Indices, units: int, context: Any) -> Tensor:
        """Forward and backward of this rank's share; returns its sums, that of the losses first."""
        mine = share_of_rank(self.cut(batch), dist.get_rank(), dist.get_world_size())
        scale = dist.get_world_size() * self.accumulation_steps / max(1, units)
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for number, rows in enumerate(mine, start=1):
            if number > 1 and self.vote is not None:
                self.vote.take()
            self.engine.set_gradient_accumulation_boundary(number == len(mine))
            # A rank with nothing left computes a sample that counts for nothing: collectives need every rank.
            sums = self.micro_sums(self.filler(batch) if rows is None else rows, context)
            if rows is None:
                sums = sums * 0.0
            self.engine.backward(sums[0] * scale)
            total = total + sums.detach()
        return total

    def cut(self, batch: Indices) -> list[list[Row]]:
        """The global batch as micro batches of all ranks."""
        return cut_batch(
            batch,
            self.store,
            self.micro_batch_size,
            self.max_length,
            dist.get_world_size(),
            packing=self.packing,
        )

    def micro_sums(
        self,
        rows: list[Row],
        context: Any = None,  # noqa: ARG002 - comparisons want it
        model: Any = None,
    ) -> Tensor:
        """Sums over a micro batch, that of its losses first; through the engine or the model inside it."""
        return self.losses(rows, "sum", model).reshape(1)

    def losses(self, rows: list[Row], reduction: str, model: Any = None) -> Tensor:
        """The sum of the losses of a micro batch, or with `none` that of each labelled token."""
        micro = collate(self.store, rows, self.pad_id, self.max_length)
        weights = self.engine.module.get_input_embeddings().weight
        prepared = prepare_rows(
            torch.from_numpy(micro.input_ids),
            torch.from_numpy(micro.labels),
            torch.from_numpy(micro.attention_mask),
            _optional(micro.document_ids),
            _optional(micro.previous_ids),
            device=self.device,
            dtype=weights.dtype,
        )
        called = self.engine if model is None else model
        output = called(rows=prepared, use_cache=False, return_logits=False, loss_reduction=reduction)
        loss: Tensor = output.loss
        return loss

    def _clip_without_zero(self) -> Tensor | None:
        """Clip plain fp32 gradients and return their norm, which DeepSpeed does not tell without ZeRO."""
        if hasattr(self.engine.optimizer, "optimizer"):
            return None
        limit = self.max_grad_norm or float("inf")
        parameters = [item for item in self.engine.module.parameters() if item.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _agree(self, local_sums: Tensor, own: Wishes) -> tuple[list[float], Wishes, float]:
        """The sums of all ranks, what all will do, and the highest memory, of which each rank adds its own in
        a place of its own."""
        told = local_sums.new_zeros(2 + dist.get_world_size())
        told[0], told[1] = float(own.stop), float(own.save and dist.get_rank() == 0)
        told[2 + dist.get_rank()] = memory_bytes(self.device)
        numbers = torch.cat((local_sums, told))
        dist.all_reduce(numbers)
        sums, (stops, saves, *memory) = (
            numbers[: len(local_sums)].tolist(),
            numbers[len(local_sums) :].tolist(),
        )
        return sums, Wishes(stops > 0, saves > 0), max(memory)


def _optional(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
