"""The localized filter of Yuan 2.0 over vLLM's flattened tokens, with its state in vLLM's cache.

Tensor suffixes: T tokens of the step, all requests one after the other, decodes first; S requests; H hidden
size; C this rank's channels of the first convolution.

A layer's state is what stands before a request's next token: the last input `a` [H] and the last output of
the first convolution [C]. At a request's start it is zero, which is what the model asks for (no bias there).
The mathematics: arXiv 2311.15786, and `o1[t] = W1 (a[t-1], a[t]) + b1; o2[t] = W2 (o1[t-1], o1[t]) + b2; f =
RMSNorm(o2 + a)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from yuan2_vllm.linear import PairsToColumns, RowsToPairs

NORM_EPS = 1e-6
"""Of the filter's norm, whatever `rms_norm_eps` says."""


def state_shapes(hidden_size: int, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one request's state in one layer on one rank: [H] and [C]."""
    return (hidden_size,), (hidden_size // 2 // ranks,)


class FilterState(MambaBase, nn.Module):
    """Tells vLLM about the state; vLLM allocates it and binds `kv_cache`, a tensor a part over all slots."""

    def __init__(self, hidden_size: int, vllm_config: VllmConfig, name: str) -> None:
        nn.Module.__init__(self)
        self.hidden_size = hidden_size
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = (torch.tensor([]),)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return state_shapes(self.hidden_size, get_tensor_model_parallel_world_size())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtype, self.dtype

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV


class LocalizedFilter(nn.Module):
    """Two causal convolutions of width two around a residual, split over ranks by the channels between."""

    def __init__(self, hidden_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.conv1 = PairsToColumns(2 * hidden_size, hidden_size // 2, prefix=f"{prefix}.conv1")
        self.conv2 = RowsToPairs(hidden_size, hidden_size, prefix=f"{prefix}.conv2")
        self.output_layernorm = RMSNorm(hidden_size, eps=NORM_EPS)
        self.state_name = f"{prefix}.state"
        self.state = FilterState(hidden_size, vllm_config, self.state_name)

    def forward(self, a_TH: Tensor) -> Tensor:
        between_TC, _ = self.conv1(self._pairs(a_TH, 0))
        out_TH, _ = self.conv2(self._pairs(between_TC, 1))
        filtered: Tensor = self.output_layernorm(out_TH + a_TH)
        return filtered

    def _pairs(self, x: Tensor, part: int) -> Tensor:
        """[T, 2 * channels]: each token's predecessor and itself, interleaved by channel."""
        previous = torch.empty_like(x)
        torch.ops.vllm.yuan2_previous(x, previous, self.state_name, part)
        return torch.stack((previous, x), dim=-1).flatten(1)


def yuan2_previous(x: Tensor, out: Tensor, layer_name: str, part: int) -> None:
    """Fill `out` with the vector before each token, from the step or the state, and move the state on.

    Reads each step's metadata, so it is an op of its own: opaque to torch.compile, and CUDA graphs are cut
    here. Nothing waits for the device.
    """
    context = get_forward_context()
    if context.attn_metadata is None:  # a run that measures memory, before there is a cache
        out.copy_(x)
        return
    metadata = context.attn_metadata[layer_name]
    state = context.no_compile_layers[layer_name].kv_cache[part]
    if metadata.num_prefills == 0:
        _previous_of_decodes(x, out, state, metadata.state_indices_tensor_d)
        return
    places = _places(metadata)
    before_S = state[places.slot_S].masked_fill(~places.known_S1, 0)
    out[1:] = x[:-1]
    out[places.first_S] = before_S
    state[places.slot_S] = x[places.last_S]


def _previous_of_decodes(x: Tensor, out: Tensor, state: Tensor, slots: Tensor) -> None:
    """One token each. A full CUDA graph has rows that only fill it up: their slot is the null block."""
    slot_T = slots.flatten()[: x.shape[0]]
    rows = slot_T.shape[0]
    torch.index_select(state, 0, slot_T, out=out[:rows])
    state[slot_T.long()] = x[:rows]


class _Places(NamedTuple):
    """Where requests begin and end in a step, and where their states are."""

    first_S: Tensor
    last_S: Tensor
    slot_S: Tensor
    known_S1: Tensor
    """False where a request begins: its slot holds what an earlier request has left."""


def _places(metadata: Any) -> _Places:
    """Computed once a step: all layers of a cache group share the metadata object."""
    places = metadata.__dict__.get("_yuan2_places")
    if places is None:
        places = metadata.__dict__["_yuan2_places"] = _compute_places(metadata)
    known: _Places = places
    return known


def _compute_places(metadata: Any) -> _Places:
    decodes = metadata.num_decodes
    ends = metadata.query_start_loc_p.long() + metadata.num_decode_tokens
    first, last = ends[:-1], ends[1:] - 1
    slots = metadata.state_indices_tensor_p.flatten().long()
    known = metadata.has_initial_states_p
    if decodes:
        tokens = torch.arange(decodes, device=slots.device)
        first, last = torch.cat((tokens, first)), torch.cat((tokens, last))
        slots = torch.cat((metadata.state_indices_tensor_d.flatten()[:decodes].long(), slots))
        known = torch.cat((known.new_ones(decodes), known))
    return _Places(first, last, slots, known[:, None])


def _changes_only_out(x: Tensor, out: Tensor, layer_name: str, part: int) -> None:
    """What torch.compile traces."""


direct_register_custom_op(
    op_name="yuan2_previous",
    op_func=yuan2_previous,
    mutates_args=["out"],
    fake_impl=_changes_only_out,
)
