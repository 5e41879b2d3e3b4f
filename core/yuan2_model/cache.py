"""What a decoder remembers: keys and values, and two vectors of each layer's localized filter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROWTH = 1.25
_GRAIN = 64
"""Buffers hold a multiple of this many tokens, so that most appended tokens only write."""


@dataclass
class LayerState:
    """One layer's memory; absent tensors mean that nothing was seen yet."""

    keys_BSND: Tensor | None = None
    values_BSND: Tensor | None = None
    input_B1H: Tensor | None = None
    """The filter's input at each row's last real token: zero before the first one."""
    middle_B1C: Tensor | None = None
    """The first convolution's output there (what the input before it would be needed for): zero likewise."""

    def select(self, rows: Tensor) -> LayerState:
        """The same memory for the given batch rows, copied."""
        tensors = (self.keys_BSND, self.values_BSND, self.input_B1H, self.middle_B1C)
        return LayerState(*(None if x is None else x.index_select(0, rows.to(x.device)) for x in tensors))


class Yuan2Cache:
    """Memory of a batch of sequences; `generate` hands it through as `past_key_values`.

    `length` counts columns, padding included; `valid_BS` is False in the padding, or None where there is
    none.
    """

    is_compileable = False
    """transformers asks before it compiles `generate`'s steps."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerState() for _ in range(layers)]
        self.length = 0
        self.valid_BS: Tensor | None = None

    @property
    def is_linear(self) -> list[bool]:
        """Of every layer, whether it has linear attention: none has (transformers asks)."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held; every layer holds as many (transformers' name and parameter)."""
        if not 0 <= layer_idx < len(self.layers):
            raise IndexError(f"layer {layer_idx} of a cache with {len(self.layers)} layers")
        return self.length

    def append(self, layer: int, keys_BTND: Tensor, values_BTND: Tensor) -> tuple[Tensor, Tensor]:
        """Add this call's keys and values to a layer and return all of them, [B, S, N, D] each."""
        state = self.layers[layer]
        state.keys_BSND = _extended(state.keys_BSND, keys_BTND, self.length)
        state.values_BSND = _extended(state.values_BSND, values_BTND, self.length)
        stop = self.length + keys_BTND.shape[1]
        return state.keys_BSND[:, :stop], state.values_BSND[:, :stop]

    def advance(self, tokens: int, valid_BS: Tensor | None) -> None:
        """Count the columns that every layer has appended; `valid_BS` covers all columns, old and new."""
        self.length += tokens
        self.valid_BS = valid_BS

    def select(self, rows: Tensor) -> Yuan2Cache:
        """A cache of the given batch rows (an index may come twice, as in beam search)."""
        chosen = Yuan2Cache(0)
        chosen.layers = [state.select(rows) for state in self.layers]
        chosen.length = self.length
        chosen.valid_BS = None if self.valid_BS is None else self.valid_BS[rows.to(self.valid_BS.device)]
        return chosen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Become `select(beam_idx)`: what transformers' beam search calls."""
        vars(self).update(vars(self.select(beam_idx)))

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values as transformers lays them out, [B, N, S, D]; it reads S from them."""
        state = self.layers[layer_idx]
        if state.keys_BSND is None or state.values_BSND is None:
            raise IndexError(f"layer {layer_idx} of a cache that holds no token yet")
        return (
            state.keys_BSND[:, : self.length].transpose(1, 2),
            state.values_BSND[:, : self.length].transpose(1, 2),
        )


def _extended(buffer: Tensor | None, new_BTND: Tensor, length: int) -> Tensor:
    """A buffer with `new` after the first `length` columns, written in place where it fits."""
    if new_BTND.requires_grad or (buffer is not None and buffer.requires_grad):
        # Autograd keeps what it saw: a buffer written in place would spoil the backward of earlier calls.
        return new_BTND if buffer is None else torch.cat((buffer[:, :length], new_BTND), dim=1)
    stop = length + new_BTND.shape[1]
    if buffer is None or buffer.shape[1] < stop:
        grown = new_BTND.new_empty(new_BTND.shape[0], _capacity(stop), *new_BTND.shape[2:])
        if buffer is not None:
            grown[:, :length] = buffer[:, :length]
        buffer = grown
    buffer[:, length:stop] = new_BTND
    return buffer


def _capacity(tokens: int) -> int:
    return -(-int(tokens * _GROWTH) // _GRAIN) * _GRAIN
