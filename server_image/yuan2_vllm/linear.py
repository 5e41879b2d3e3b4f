"""vLLM's linear layers, with weights that load in Yuan 2.0's order of heads and shape of convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear


def in_rank_order(tensor: Tensor, dim: int, ranks: int) -> Tensor:
    """Put a dimension over all heads into the order in which ranks hold them.

    A rank holds a part of the first half of the heads and the same part of the second (see `model`): with
    two ranks the quarters 0 1 2 3 become 0 2 1 3.

    Raises:
        ValueError: the dimension cannot be split so, as that of coarse quantisation scales may.
    """
    size = tensor.shape[dim]
    if size % (2 * ranks):
        raise ValueError(f"o_proj: {size} columns or scales cannot be split over {ranks} ranks, half by half")
    parts = tensor.unflatten(dim, (2, ranks, size // (2 * ranks)))
    return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)


class OrderedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer whose input is heads in rank order; its weights come in the published order."""

    def weight_loader(self, param: Any, loaded_weight: Tensor) -> None:
        super().weight_loader(param, self._ordered(param, loaded_weight))

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        super().weight_loader_v2(param, self._ordered(param, loaded_weight))

    def _ordered(self, param: Any, tensor: Tensor) -> Tensor:
        dim = getattr(param, "input_dim", None)
        return tensor if dim is None or tensor.dim() <= dim else in_rank_order(tensor, dim, self.tp_size)


class PairsToColumns(ColumnParallelLinear):
    """The filter's first convolution, split by its output channels.

    A published kernel [out, in, 2, 1] is, as it lies in memory, a matrix over interleaved channels
    (x[t-1, 0], x[t, 0], x[t-1, 1], ...). Never quantised, and no target of LoRA: a class of its own is left
    alone.
    """

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        super().weight_loader_v2(param, _as_matrix(loaded_weight))


class RowsToPairs(RowParallelLinear):
    """The filter's second convolution, split by its input channels; otherwise as `PairsToColumns`."""

    def weight_loader_v2(self, param: Any, loaded_weight: Tensor) -> None:
        super().weight_loader_v2(param, _as_matrix(loaded_weight))


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.flatten(1) if kernel.dim() > 1 else kernel
