"""The weights of a run's model by their published names, one at a time, whatever ZeRO, PEFT or bitsandbytes
made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from yuan2_core.sections import LoRA
from yuan2_model import Yuan2ForCausalLM
from yuan2_model.adapters import merge_layer
from yuan2_model.dimensions import EMBEDDING, HEAD, tensor_shapes
from yuan2_trainer.model.adapters import add_adapter, is_adapter, published_name
from yuan2_trainer.model.quantised import dequantised
from yuan2_trainer.model.spreading import gathering


class PublishedWeights:
    """Reads them on rank 0; all ranks ask for the same ones in the same order.

    Args:
        model: what was trained.
        adapter: what it was trained with, to be merged; `None`: a model without adapter.
    """

    def __init__(self, model: Any, adapter: LoRA | None) -> None:
        parameters = dict(model.named_parameters())
        self._own = {published_name(name): item for name, item in parameters.items() if not is_adapter(name)}
        self._beside: dict[str, dict[str, Any]] = {}
        """Published name of a merged weight to the adapter's parameters, by their names in its layer."""
        for name, item in parameters.items():
            if is_adapter(name):
                layer, _, rest = name.partition(".lora_")
                self._beside.setdefault(f"{layer}.weight", {})[f"lora_{rest}"] = item
        self._shapes = tensor_shapes(model.config.dimensions())
        self._merger = None if adapter is None else _merger(model, adapter)

    @property
    def dtype(self) -> torch.dtype:
        """Type of all of them."""
        return self._own[EMBEDDING].dtype

    def read(self, name: str) -> Tensor | None:
        """A tensor on the CPU, in the type of the weights, on rank 0; `None` on other ranks."""
        own = self._own[EMBEDDING if name == HEAD and HEAD not in self._own else name]
        value = _whole(own, self._shapes[name])
        beside = {key: _whole(item, item.shape) for key, item in self._beside.get(name, {}).items()}
        if value is None:
            return None
        if not beside:
            return value.to(self.dtype)
        assert self._merger is not None
        return _merged(self._merger.get_submodule(name.rpartition(".")[0]), value, beside)


def _whole(parameter: Any, shape: Sequence[int]) -> Tensor | None:
    with gathering(parameter, None):
        return dequantised(parameter, shape).to("cpu", copy=True) if dist.get_rank() == 0 else None


def _merger(model: Any, adapter: LoRA) -> Yuan2ForCausalLM:
    """PEFT's layers without memory: each gets its tensors for as long as they are merged."""
    with torch.device("meta"):
        empty = Yuan2ForCausalLM(model.config)
        return add_adapter(empty, adapter, "")


def _merged(layer: Any, weight: Tensor, beside: dict[str, Tensor | None]) -> Tensor:
    layer.load_state_dict({"base_layer.weight": weight, **beside}, assign=True)
    merge_layer(layer)
    merged: Tensor = layer.get_base_layer().weight.detach()
    layer.to("meta")
    return merged
