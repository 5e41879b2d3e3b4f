"""Optimizer steps over comparisons: DPO, ORPO and KTO on the loop of SFT.

A batch counts comparisons. The two answers of a pair lie in one row, which holds their prompt once; rows are
packed as those of SFT are, and are up to twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from yuan2_core.preferences import CHOSEN
from yuan2_core.sections import DPO, KTO, ORPO
from yuan2_trainer.data.comparisons import MISMATCHED
from yuan2_trainer.data.families import family_of
from yuan2_trainer.data.order import Indices, share_of_rank
from yuan2_trainer.data.packing import Row, cut_families
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.train.preference_losses import Compared, dpo, kto, orpo
from yuan2_trainer.train.step import Stepper


@dataclass
class Reference:
    """Log-probabilities of all samples of a store by the model that training started from, once known."""

    values: NDArray[np.float32] | None = None

    def of(self, samples: Indices, device: torch.device) -> Tensor:
        """Those of some samples."""
        assert self.values is not None  # computed before the first step
        return torch.from_numpy(self.values[samples]).to(device)


@dataclass(frozen=True)
class PreferenceStepper(Stepper):
    """Takes global batches of comparisons through the engine; the loss is the mean over them."""

    settings: DPO | ORPO | KTO = field(default_factory=DPO)
    reference: Reference = field(default_factory=Reference)

    def over(self, store: SampleStore) -> PreferenceStepper:
        """The same over other samples, whose reference is to be computed."""
        return replace(self, store=store, reference=Reference())

    def units(self, batch: Indices) -> int:
        """Comparisons: pairs, or marked answers."""
        return len(batch) // 2

    def filler(self, batch: Indices) -> list[Row]:
        """A comparison for a rank that has nothing left."""
        return [batch[:1] if isinstance(self.settings, KTO) else batch[:2]]

    def cut(self, batch: Indices) -> list[list[Row]]:
        """Micro batches of all ranks; with KTO without the answers that only tell how far the model moved."""
        if isinstance(self.settings, KTO):
            batch = batch[self.store.marks[batch] != MISMATCHED]
        return self.cut_all(batch)

    def cut_all(self, samples: Indices) -> list[list[Row]]:
        """Any samples as micro batches of all ranks."""
        return cut_families(
            samples,
            self.store,
            self.micro_batch_size,
            self.max_length,
            dist.get_world_size(),
            packing=self.packing,
        )

    def begin(self, batch: Indices) -> float:
        """With KTO, how far the model has moved: the mean over the batch's mismatched answers, at least 0."""
        if not isinstance(self.settings, KTO):
            return 0.0
        others = batch[self.store.marks[batch] == MISMATCHED]
        moved = self.log_probabilities(others).double().cpu()
        before = self.reference.of(others, moved.device).double()
        return max(0.0, float((moved - before).mean()))

    def log_probabilities(self, samples: Indices) -> Tensor:
        """Of some samples' answers, in their order; the same on all ranks, without gradients or dropout."""
        place = np.zeros(len(self.store), dtype=np.int64)
        place[samples] = np.arange(len(samples))
        found = torch.zeros(len(samples), device=self.device)
        mine = share_of_rank(self.cut_all(samples), dist.get_rank(), dist.get_world_size())
        was_training = self.engine.module.training
        self.engine.eval()
        with torch.no_grad():
            for number, rows in enumerate(mine, start=1):
                if number > 1 and self.vote is not None:
                    self.vote.take()
                used = [samples[:1]] if rows is None else rows
                placed, sums = self.summed(used, self.engine.module)
                if rows is not None:
                    found[torch.from_numpy(place[placed]).to(self.device)] = sums
        self.engine.train(was_training)
        dist.all_reduce(found)
        return found

    def summed(self, rows: list[Row], model: Any = None) -> tuple[Indices, Tensor]:
        """The samples of some rows as they lie there, and the log-probability of each one's answer."""
        placed = np.concatenate([family.samples for row in rows for family in family_of(row, self.store)])
        owner = np.repeat(np.arange(len(placed)), self.store.labelled[placed])
        losses = self.losses(rows, "none", model)
        owner_L = torch.from_numpy(owner).to(self.device)
        return placed, torch.zeros(len(placed), device=self.device).index_add(0, owner_L, -losses)

    def micro_sums(self, rows: list[Row], context: float = 0.0, model: Any = None) -> Tensor:
        """Sums over a micro batch: losses, rewards of chosen and of rejected answers, pairs in which the
        chosen one's is higher, and how many answers of either kind there are."""
        placed, sums = self.summed(rows, model)
        order = np.argsort(placed)
        samples, policy = placed[order], sums[torch.from_numpy(order).to(self.device)]
        if isinstance(self.settings, KTO):
            return self._marked(samples, policy, context, self.settings)
        found = self._pairs(samples, policy.view(-1, 2))
        right = (found.chosen > found.rejected).sum().to(policy.dtype)
        count = right.new_full((), len(found.losses))
        return torch.stack(
            (
                found.losses.sum(),
                found.chosen.sum().detach(),
                found.rejected.sum().detach(),
                right,
                count,
                count,
            )
        )

    def rewards(self, sums: list[float], context: Any) -> dict[str, float] | None:
        """Mean rewards, their margin and, of pairs, how often the chosen answer's is higher."""
        _, chosen, rejected, right, many_chosen, many_rejected = sums
        chosen, rejected = chosen / max(1.0, many_chosen), rejected / max(1.0, many_rejected)
        found = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
        if isinstance(self.settings, KTO):
            return {**found, "kl": float(context)}
        return {**found, "accuracy": right / max(1.0, many_chosen)}

    def _pairs(self, samples: Indices, policy_P2: Tensor) -> Compared:
        if isinstance(self.settings, ORPO):
            tokens = torch.from_numpy(self.store.labelled[samples]).to(self.device).view(-1, 2)
            return orpo(policy_P2 / tokens, self.settings)
        assert isinstance(self.settings, DPO)
        return dpo(policy_P2, self.reference.of(samples, self.device).view(-1, 2), self.settings)

    def _marked(self, samples: Indices, policy: Tensor, kl: float, settings: KTO) -> Tensor:
        desirable = torch.from_numpy(self.store.marks[samples] == CHOSEN).to(self.device)
        losses, rewards = kto(policy, self.reference.of(samples, self.device), desirable, kl, settings)
        rewards = rewards.detach()
        zero = rewards.new_zeros(())
        return torch.stack(
            (
                losses.sum(),
                torch.where(desirable, rewards, zero).sum(),
                torch.where(desirable, zero, rewards).sum(),
                zero,
                desirable.sum().to(rewards.dtype),
                (~desirable).sum().to(rewards.dtype),
            )
        )
