"""Weights that one rank reads for all, so that storage serves a model once, however many ranks a run has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yuan2_model.dimensions import HEAD
from yuan2_model.files import ModelFacts
from yuan2_model.weights import read_tensors, tensor_order

READER = 0
"""The rank that reads."""


def untied_names(facts: ModelFacts) -> list[str]:
    """The tensors that a model's parameters are filled from, in the order of `untied_tensors`."""
    tied = facts.dimensions.tie_word_embeddings
    return [name for name in tensor_order(facts) if not (tied and name == HEAD)]


def untied_tensors(facts: ModelFacts) -> Iterator[tuple[str, Tensor]]:
    """`read_tensors` without the copy of the embedding, which was compared with it.

    Raises:
        ModelFilesError: as `read_tensors`.
    """
    tied = facts.dimensions.tie_word_embeddings
    return (item for item in read_tensors(facts) if not (tied and item[0] == HEAD))


def spread_tensors(
    facts: ModelFacts, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a directory on every rank, read by one. All ranks take part in each.

    Args:
        facts: of a checked directory.
        dtype: what they are given in.
        device: where they are given; on a GPU no host holds more than one of them beside the page cache.

    Raises:
        ModelFilesError: on the reading rank, as `read_tensors`.
    """
    if reads():
        for name, tensor in untied_tensors(facts):
            yield name, _sent(tensor.to(device, dtype))
        return
    for name in untied_names(facts):
        yield name, _sent(torch.empty(facts.tensors[name].shape, dtype=dtype, device=device))


def fill(model: nn.Module, values: Iterator[Tensor], names: Iterable[str]) -> None:
    """Set parameters by name, whole or cut by ZeRO-3, from values of the reading rank.

    Args:
        model: all ranks have the same one.
        values: of `names`, in their order; looked at on the reading rank only.
        names: the same on all ranks.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        with gathering(parameter, READER), torch.no_grad():
            if reads():
                parameter.copy_(next(values))
            if not is_cut(parameter):
                _sent(parameter.data)
    # What comes after the last one is not filled in, but is checked, as a tied output layer.
    assert not reads() or next(values, None) is None


def reads() -> bool:
    """Whether this process is the one that reads; without a process group it is alone."""
    return not dist.is_initialized() or dist.get_rank() == READER


def is_cut(parameter: Any) -> bool:
    """Whether ZeRO-3 has cut a parameter into a piece a rank."""
    return hasattr(parameter, "ds_id")


def gathering(parameter: Any, modifier_rank: int | None) -> AbstractContextManager[None]:
    """Inside, a parameter of ZeRO-3 is whole, and what one rank sets stays; any other is as it was.

    All ranks take part.
    """
    if not is_cut(parameter):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank
    )
    return context


def _sent(tensor: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, READER)
    return tensor
