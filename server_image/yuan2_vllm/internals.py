"""What is not public API of vLLM or transformers, each with its reason. Tests: `test_internals.py`.

A model that is not Yuan 2.0 is served as without the plugin.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TESTED_WITH = "0.32.0"
"""The version of vLLM that the tests run with."""


def install() -> None:
    """What every process of vLLM needs before it reads a model; safe to call twice."""
    _prefer_our_tokenizer()
    _cut_graphs_at_the_filter()


@cache
def install_lora() -> None:
    """What LoRA needs, before the layers are wrapped. Called for a Yuan 2.0 with `--enable-lora` only."""
    _wrap_ordered_layers()
    _mend_lora_on_cpu()


def _prefer_our_tokenizer() -> None:
    """`AutoTokenizer` believes `tokenizer_class` of tokenizer_config.json over a registered class.

    Published directories say `LlamaTokenizer`, whose version 5 encodes runs of spaces differently.
    transformers keeps a list of model types where that file is wrong, and has no public way onto it.
    """
    from transformers.models.auto import tokenization_auto

    tokenization_auto.TOKENIZER_MAPPING_NAMES["yuan"] = "Yuan2Tokenizer"
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add("yuan")


def _cut_graphs_at_the_filter() -> None:
    """Piecewise CUDA graphs must be cut at the op that reads each step's metadata; vLLM's list of such ops is
    private."""
    from vllm.config.compilation import CompilationConfig

    if "vllm::yuan2_previous" not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append("vllm::yuan2_previous")


def _wrap_ordered_layers() -> None:
    """vLLM wraps the layer classes that it knows. The input of `o_proj` comes in another order: so must the
    columns of an adapter's A."""
    from vllm.lora import utils
    from vllm.lora.layers import RowParallelLinearWithLoRA

    from yuan2_vllm.linear import OrderedRowParallelLinear, in_rank_order

    class OrderedRowParallelLinearWithLoRA(RowParallelLinearWithLoRA):
        def slice_lora_a(self, lora_a: Tensor) -> Tensor:
            mine: Tensor = super().slice_lora_a(in_rank_order(lora_a, 1, self.tp_size))
            return mine

        @classmethod
        def can_replace_layer(cls, source_layer: Any, **_: Any) -> bool:
            return type(source_layer) is OrderedRowParallelLinear

    utils._all_lora_classes = (*utils._all_lora_classes, OrderedRowParallelLinearWithLoRA)


def _mend_lora_on_cpu() -> None:
    """A row without an adapter has slot -1, which vLLM's CPU code reads as Python does: as the last slot.

    So once every slot is taken (one adapter with `max_loras` 1, two with 2) requests to the base got an
    adapter. That code also copies an adapter's matrices for each token: 1 GB a layer for 2,048 tokens at r
    64. Here a slot's rows are selected instead. CUDA has kernels of its own.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    PunicaWrapperCPU._apply_shrink = _apply_shrink
    PunicaWrapperCPU._apply_expand = _apply_expand


def _apply_shrink(self: Any, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
    """y [T, r] = scale · A x, with each token's A out of [slots, 1, r, in]."""
    y.copy_(scale * by_slot(x.to(y.dtype), w_t_all.to(y.dtype), self.token_lora_indices))


def _apply_expand(
    self: Any,
    y: Tensor,
    x: Tensor,
    w_t_all: Tensor,
    y_offset: int,
    y_slice_size: int,
    add_inputs: bool = True,
) -> None:
    """y [T, offset : offset + size] += B x, with each token's B out of [slots, 1, size, r]."""
    columns = y[:, y_offset : y_offset + y_slice_size]
    update = by_slot(x.to(y.dtype), w_t_all.to(y.dtype), self.token_lora_indices)
    columns.copy_(columns + update if add_inputs else update)


def by_slot(x: Tensor, weights: Tensor, slot_T: Tensor) -> Tensor:
    """[T, out]: rows of x [T, in] times their slots' matrices [slots, 1, out, in]; 0 in slot -1."""
    out = torch.zeros(x.shape[0], weights.shape[-2], dtype=x.dtype, device=x.device)
    for slot in range(weights.shape[0]):
        out += F.linear(x * (slot_T == slot).unsqueeze(1), weights[slot, 0])
    return out
