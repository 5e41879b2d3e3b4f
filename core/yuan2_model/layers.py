"""The layers of Yuan 2.0 (arXiv 2311.15786); shape legend in `yuan2_model.attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from yuan2_model.attention import attend
from yuan2_model.cache import LayerState, Yuan2Cache
from yuan2_model.config import Yuan2Config
from yuan2_model.dimensions import FILTER_TAPS
from yuan2_model.layout import Forks, Layout
from yuan2_model.loss import labelled_loss_sum, labelled_losses

ROPE_BASE = 10000.0
FILTER_NORM_EPS = 1e-6
"""The filter's own norm has this epsilon whatever config.json says."""


class Rotation(NamedTuple):
    """Cosines and sines of the angles, [B or 1, T, 1, 1, D / 2], to broadcast over heads and (q, k)."""

    cos: Tensor
    sin: Tensor


def rotation(positions_BT: Tensor, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Rotary tables for given positions: fp32 angles, cast to what attention computes in.

    Computed anew each call (one row of sines for a token, once for all layers) rather than kept in a buffer,
    which would have to survive meta devices, casts and partitioning.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    angles = positions_BT[..., None, None, None].float() * ROPE_BASE ** (-channels / head_dim)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


class _Rotate(torch.autograd.Function):
    """Rotate halves by given angles; the gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-direction)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=direction)
    return out


class _Normalise(torch.autograd.Function):
    """x / rms(x) * weight with a gradient of its own: half the passes over memory, and only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grad.float()
        product = grad * normed
        # d/dx of w x / rms(x): the part along x vanishes, for a scaled x has the same norm.
        along = (product @ weight.float().unsqueeze(-1)).div_(x.shape[-1])
        x_grad = (grad * weight).addcmul_(normed, along, value=-1).mul_(inverse)
        return x_grad.to(x.dtype), product.flatten(0, -2).sum(dim=0).to(weight.dtype), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 and cast back to the input's type before the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Normalise the last dimension; shape and type stay."""
        if torch.is_grad_enabled():
            normed: Tensor = _Normalise.apply(x_BTH, self.weight, self.eps)
            return normed
        return (x_BTH.float() * _inverse_rms(x_BTH, self.eps)).to(x_BTH.dtype) * self.weight


class _Pair(torch.autograd.Function):
    """Each token's channels beside those of the token before it, [B, T, C, 2].

    Shifting, masking and stacking give the same with twice the passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, before_B1C: Tensor | None, starts_S: Tensor | None, forks: Forks | None
    ) -> Tensor:
        ctx.starts_S, ctx.forks, ctx.continues = starts_S, forks, before_B1C is not None
        pairs = x_BTC.new_empty(*x_BTC.shape, FILTER_TAPS)
        previous, own = pairs.unbind(dim=-1)
        own.copy_(x_BTC)
        previous[:, 1:] = x_BTC[:, :-1]
        previous[:, :1] = 0 if before_B1C is None else before_B1C
        previous_MC = previous.flatten(0, 1)
        if starts_S is not None:
            previous_MC.index_fill_(0, starts_S, 0)
        if forks is not None:
            previous_MC.index_copy_(0, forks.first, x_BTC.flatten(0, 1).index_select(0, forks.before))
        return pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        previous, own = grad.unbind(dim=-1)
        x_grad = own.clone(memory_format=torch.contiguous_format)
        x_grad_MC, previous_MC = x_grad.flatten(0, 1), previous.flatten(0, 1)
        if ctx.starts_S is None:
            x_grad[:, :-1] += previous[:, 1:]
        else:
            # Nothing follows a sequence's last token: what is added to its gradient is taken back.
            ends_S = ctx.starts_S - 1
            alone_SC = x_grad_MC.index_select(0, ends_S)
            x_grad[:, :-1] += previous[:, 1:]
            x_grad_MC.index_copy_(0, ends_S, alone_SC)
        if ctx.forks is not None:
            x_grad_MC.index_add_(0, ctx.forks.before, previous_MC.index_select(0, ctx.forks.first))
        return x_grad, previous[:, :1].clone() if ctx.continues else None, None, None


def beside_previous(
    x_BTC: Tensor, before_B1C: Tensor | None, starts_S: Tensor | None, forks: Forks | None
) -> Tensor:
    """What a `PairConvolution` multiplies its weights with, [B, T, 2 C]; arguments as its own."""
    pairs: Tensor = _Pair.apply(x_BTC, before_B1C, starts_S, forks)
    return pairs.flatten(2)


class PairConvolution(nn.Module):
    """Causal convolution over a token and the one before it, parameters as published: weight [out, in, 2, 1].

    One matrix product on interleaved channels (x[t-1, 0], x[t, 0], x[t-1, 1], ...): in that order the
    published weight is the matrix as it lies in memory, while any other way copies it for each call, which
    dominates decoding.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, FILTER_TAPS, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self,
        x_BTC: Tensor,
        before_B1C: Tensor | None,
        starts_S: Tensor | None,
        forks: Forks | None = None,
    ) -> Tensor:
        """Convolve; `before` precedes the first token (None: zero), nothing the tokens at `starts`, but at
        `forks` what stands there."""
        pairs_BTP = beside_previous(x_BTC, before_B1C, starts_S, forks)
        return F.linear(pairs_BTP, self.weight.view(self.weight.shape[0], -1), self.bias)


class LocalizedFilter(nn.Module):
    """Two causal convolutions around a residual: what q and k are made from."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.conv1 = PairConvolution(hidden_size, hidden_size // 2)
        self.conv2 = PairConvolution(hidden_size // 2, hidden_size)
        self.output_layernorm = RMSNorm(hidden_size, FILTER_NORM_EPS)

    def forward(self, a_BTH: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """Filter `a`; `state` is read for what came before and left at each row's last real token."""
        before, middle_before = (None, None) if state is None else (state.input_B1H, state.middle_B1C)
        middle_BTC = self.conv1(a_BTH, before, layout.starts_S, layout.forks)
        out_BTH = self.conv2(middle_BTC, middle_before, layout.starts_S, layout.forks)
        if state is not None:
            state.input_B1H = _last_real(a_BTH, before, layout.last_B)
            state.middle_B1C = _last_real(middle_BTC, middle_before, layout.last_B)
        filtered: Tensor = self.output_layernorm(out_BTH + a_BTH)
        return filtered


def _last_real(x_BTC: Tensor, before_B1C: Tensor | None, last_B: Tensor | None) -> Tensor:
    """Each row's vector at its last real token, or what it was before where this call brought none."""
    if last_B is None:
        # A copy: a view would keep the whole call's activations alive in the cache.
        return x_BTC[:, -1:].clone()
    if before_B1C is None:
        before_B1C = x_BTC.new_zeros(x_BTC.shape[0], 1, x_BTC.shape[2])
    rows_B = torch.arange(x_BTC.shape[0], device=x_BTC.device)
    latest_BC = x_BTC[rows_B, last_B.clamp_min(0)]
    return torch.where((last_B >= 0)[:, None], latest_BC, before_B1C[:, 0]).unsqueeze(1)


class Attention(nn.Module):
    """Localized-filtering attention: q and k from the filtered input, v from the input itself."""

    def __init__(self, config: Yuan2Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.lf_gate = LocalizedFilter(hidden)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self, a_BTH: Tensor, layout: Layout, turn: Rotation, cache: Yuan2Cache | None, layer: int
    ) -> Tensor:
        """Attend over the call's tokens and those of the cache, which grows by the call's."""
        batch, tokens, hidden = a_BTH.shape
        f_BTH = self.lf_gate(a_BTH, layout, None if cache is None else cache.layers[layer])
        # Head i holds rows 2di .. 2di+2d of the stacked [q_proj; k_proj], first its q and then its k: q_proj
        # makes both q and k of the first half of the heads.
        qk_BT2H = torch.cat((self.q_proj(f_BTH), self.k_proj(f_BTH)), dim=-1)
        qk = _Rotate.apply(qk_BT2H.view(batch, tokens, self.heads, 2, -1), turn.cos, turn.sin)
        q_BTND, k_BSND = qk.unbind(dim=3)
        v_BSND = self.v_proj(a_BTH).view(batch, tokens, self.heads, -1)
        if cache is not None:
            k_BSND, v_BSND = cache.append(layer, k_BSND, v_BSND)
        o_BTND = attend(q_BTND, k_BSND, v_BSND, layout.attention)
        output: Tensor = self.o_proj(_read(o_BTND.reshape(batch, tokens, hidden), layout.outputs_L))
        return output


def _read(x_BTH: Tensor, outputs_L: Tensor | None) -> Tensor:
    """What is read of these outputs: all, or the given tokens as one row, [1, L, H]."""
    return x_BTH if outputs_L is None else x_BTH.flatten(0, 1).index_select(0, outputs_L).unsqueeze(0)


class MLP(nn.Module):
    """down(gate(x) * silu(up(x))): compared with Llama, gate and up are swapped."""

    def __init__(self, config: Yuan2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Apply to each token; shape stays."""
        output: Tensor = self.down_proj(self.gate_proj(x_BTH) * F.silu(self.up_proj(x_BTH)))
        return output


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: Yuan2Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTH: Tensor, layout: Layout, turn: Rotation, cache: Yuan2Cache | None) -> Tensor:
        """One block; the cache, where there is one, grows by the call's tokens.

        Returns:
            [B, T, H]; or [1, L, H] where the layout names the tokens that are read. Past attention no token
            needs another one, so the rest is not computed for those that nobody reads.
        """
        attended = self.self_attn(self.input_layernorm(x_BTH), layout, turn, cache, self.index)
        h_BTH = _read(x_BTH, layout.outputs_L) + attended
        output: Tensor = h_BTH + self.mlp(self.post_attention_layernorm(h_BTH))
        return output


class LanguageModelHead(nn.Linear):
    """The output layer: logits, or the loss without them.

    The loss is computed inside the module's call so that ZeRO-3, which gathers a module's weights when it is
    called, has them at hand.
    """

    def forward(
        self,
        hidden_BTH: Tensor,
        next_BT: Tensor | None = None,
        chunk: int | None = None,
        each: bool = False,
        every: bool = False,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Logits [B, T, V]; or, given the label of what follows each position, the sum of the losses, or
        each of them."""
        if next_BT is not None and each:
            return labelled_losses(hidden_BTH, self.weight, next_BT, chunk, every)
        if next_BT is not None:
            return labelled_loss_sum(hidden_BTH, self.weight, next_BT, chunk, every, smoothing).total
        return super().forward(hidden_BTH)
