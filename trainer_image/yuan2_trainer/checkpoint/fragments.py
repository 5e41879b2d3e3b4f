"""The optimizer's fp32 numbers by parameter name, whatever the ZeRO stage: what a checkpoint consists of.

ZeRO cuts the flattened parameters into pieces, a piece a rank. Here every piece is found again as "elements
[start, start + n) of parameter NAME", with views of its fp32 master weights and of AdamW's two moments.
Checkpoints written from such fragments load under any number of ranks and any stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""fp32 weights and AdamW's moments, the names of the latter as in `torch.optim.AdamW`."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int
    views: dict[str, Tensor]
    """`KINDS` to 1-D views into the optimizer's memory: writing them changes the optimizer."""
    replicated: bool = False
    """Every rank holds the same fragment."""

    def share(self, rank: int, world_size: int) -> Fragment:
        """The part of the fragment that a rank saves: all of it, or its share of a replicated one."""
        if not self.replicated:
            return self
        first, last = (self.numel * index // world_size for index in (rank, rank + 1))
        views = {kind: view[first:last] for kind, view in self.views.items()}
        return Fragment(self.name, self.start + first, last - first, views)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """AdamW itself, inside whatever DeepSpeed wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def live_fragments(engine: Any) -> list[Fragment]:
    """All that this rank's optimizer holds, in the order of the model's parameters."""
    _ensure_moments(engine)
    wrapper = engine.optimizer
    named = [(name, item) for name, item in engine.module.named_parameters() if item.requires_grad]
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        found = _of_zero_3(wrapper, named, torch.distributed.get_rank())
    elif any(hasattr(parameter, "_hp_mapping") for _, parameter in named):
        found = _of_flat_partitions(wrapper, named)
    else:
        found = _replicated(wrapper, named)
    return [fragment for fragment in found if fragment.numel > 0]


def steps_taken(engine: Any) -> int:
    """AdamW's count of steps: those that changed the weights."""
    return int(next(iter(inner_optimizer(engine).state.values()))["step"])


def set_step(engine: Any, step: int) -> None:
    """Set AdamW's count of steps, which its bias correction uses."""
    for state in inner_optimizer(engine).state.values():
        state["step"].fill_(float(step))


def _of_zero_3(wrapper: Any, named: list[tuple[str, Any]], rank: int) -> Iterator[Fragment]:
    for name, parameter in named:
        group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = rank * size
        numel = max(0, min(size, parameter.ds_numel - start))  # the last ranks hold padding
        flat = wrapper.fp32_partitioned_groups_flat[group]
        yield Fragment(name, start, numel, _views(wrapper.optimizer, flat, offset, numel))


def _of_flat_partitions(wrapper: Any, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    """ZeRO 1 and 2 and DeepSpeed's bf16 optimizer: `_hp_mapping` links a parameter to this rank's
    partition."""
    masters = _masters(wrapper)
    for name, parameter in named:
        link = parameter._hp_mapping
        if link is None:
            continue
        flat = masters[link.param_group_index]
        place, numel = link.hp_fragment_address.start, link.hp_fragment_address.numel
        yield Fragment(
            name, link.lp_fragment_address.start, numel, _views(wrapper.optimizer, flat, place, numel)
        )


def _replicated(wrapper: Any, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    """No ZeRO: the parameters themselves in fp32, or one fp32 copy of each in bf16."""
    masters = {id(parameter): parameter for _, parameter in named}
    if hasattr(wrapper, "fp32_groups"):
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            masters.update({id(a): b for a, b in zip(low, high, strict=True)})
    optimizer = getattr(wrapper, "optimizer", wrapper)
    for name, parameter in named:
        master = masters[id(parameter)]
        yield Fragment(name, 0, master.numel(), _views(optimizer, master, 0, master.numel()), replicated=True)


def _views(optimizer: Any, master: Tensor, place: int, numel: int) -> dict[str, Tensor]:
    state = optimizer.state[master]
    whole = {"master": master.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
    return {kind: tensor.view(-1).narrow(0, place, numel) for kind, tensor in whole.items()}


def _masters(wrapper: Any) -> list[Tensor]:
    """The tensors that AdamW steps on."""
    for attribute in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(wrapper, attribute):
            return list(getattr(wrapper, attribute))
    groups = getattr(wrapper, "fp32_groups", None)
    if groups is None:
        groups = [group["params"] for group in wrapper.param_groups]
    return [tensor for group in groups for tensor in group]


def _ensure_moments(engine: Any) -> None:
    """Give AdamW the state that it would make in its first step."""
    optimizer = inner_optimizer(engine)
    on_device = bool(optimizer.defaults.get("fused"))
    for master in _masters(engine.optimizer):
        if not optimizer.state[master]:
            device = master.device if on_device else torch.device("cpu")
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{kind: torch.zeros_like(master, requires_grad=False) for kind in KINDS[1:]},
            }
