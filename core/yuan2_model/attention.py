"""The one place where attention is computed, behind `attend`.

Shape legend of this package: B batch rows, T tokens of this call, S tokens with those in the cache, N heads,
D channels of a head, H hidden size, C channels of a convolution, V vocabulary, L labelled tokens, M all
tokens of a call's rows, one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORTEST_LOOPED = 16
"""Mean segment length below which one masked product replaces a call for each segment.

Measured on one CPU core, rows of 1,024 tokens: the calls take 0.2 of the masked product's time at 16 tokens,
0.4 at 8. The bound is for GPUs, where launching so many small kernels would outlast the product.
"""
FLASH_SINCE = (2, 1)
"""From this release on flash_attn aligns its causal mask with the last key (its changelog), as a segment that
continues another one needs it."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row that see themselves causally, and the beginning of another segment."""

    length: int
    root: int = 0
    """Number of the segment that this one continues, which continues none itself."""
    seen: int = 0
    """So many of that one's first tokens come before this segment's own; 0: it continues nothing."""


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, decided once a forward pass and obeyed by every layer.

    With neither `mask` nor `segments`, token t of T sees every token of the cache and of this call up to
    itself.
    """

    mask_B1TS: Tensor | None = None
    """True (or an additive float) where a query sees a key; rows broadcast."""
    segments: tuple[Segment, ...] | None = None
    """Segments of all rows, one after the other, which hold every token."""
    varlen: VarlenPlan | None = None
    """The same as flash_attn wants it, where flash_attn will be used."""
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def mask_of(self, segment: Segment, device: torch.device) -> Tensor | None:
        """Who sees whom in a segment that continues another one; made once for all layers and passes."""
        if not segment.seen:
            return None
        key = (segment.length, segment.seen)
        if key not in self._masks:
            self._masks[key] = _causal_after(*key, device)
        return self._masks[key]


@dataclass(frozen=True)
class VarlenPlan:
    """Segments for `flash_attn_varlen_func`."""

    query_ends: Tensor
    """[segments + 1] int32: where each segment's queries end, after a zero."""
    key_ends: Tensor
    """The same of its keys."""
    most_queries: int
    most_keys: int
    keys_K: Tensor | None
    """Token of each key, where some are keys of several segments; None: all tokens in their order."""


@cache
def flash_attn_version() -> tuple[int, ...] | None:
    """Version of the flash_attn that is installed, if it is one that can be used."""
    try:
        module = import_module("flash_attn")
    except ImportError:
        return None
    version = tuple(int(part) for part in str(module.__version__).split(".")[:2] if part.isdigit())
    return version if version >= FLASH_SINCE else None


def uses_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether segments are given to flash_attn, which knows GPUs and 16-bit types only."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and bool(flash_attn_version())


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the attention of packed rows, for the log."""
    if uses_flash(device, dtype):
        version = ".".join(map(str, flash_attn_version() or ()))
        return f"flash_attn {version}, all sequences of a batch in one call"
    return (
        f"torch's scaled dot product, a call a sequence, or a block mask for rows of sequences shorter than "
        f"{SHORTEST_LOOPED} tokens"
    )


def plan_segments(
    segments: Sequence[Segment], rows: Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> AttentionPlan:
    """Isolate segments: in one call where flash_attn is, else a call each, or one mask where they are short.

    Args:
        segments: segments over all rows; the lengths sum to B * T.
        rows: anything of shape [B, T] on the device that the plan's tensors shall be on.
        dtype: what attention computes in.
        device: what it computes on; absent, that of `rows`.
    """
    batch, tokens = rows.shape[:2]
    if len(segments) == batch:
        return AttentionPlan()
    if uses_flash(rows.device if device is None else device, dtype):
        return AttentionPlan(segments=tuple(segments), varlen=plan_varlen(segments, rows.device))
    if batch * tokens >= SHORTEST_LOOPED * len(segments):
        return AttentionPlan(segments=tuple(segments))
    return AttentionPlan(mask_B1TS=_block_mask(segments, batch, tokens).to(rows.device))


def plan_varlen(segments: Sequence[Segment], device: torch.device) -> VarlenPlan:
    """Segments as flash_attn wants them."""
    queries = [segment.length for segment in segments]
    keys = [segment.seen + segment.length for segment in segments]
    starts = [0, *accumulate(queries)]
    places = None
    if any(segment.seen for segment in segments):
        whole = torch.arange(starts[-1])
        stretches = []
        for start, segment in zip(starts, segments, strict=False):
            root = starts[segment.root]
            stretches += [whole[root : root + segment.seen], whole[start : start + segment.length]]
        places = torch.cat(stretches).to(device)
    ends = [
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (queries, keys)
    ]
    return VarlenPlan(ends[0], ends[1], max(queries), max(keys), places)


def _block_mask(segments: Sequence[Segment], batch: int, tokens: int) -> Tensor:
    """[B, 1, T, T], True where a query sees a key."""
    mask = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
    starts = [0, *accumulate(segment.length for segment in segments)]
    for start, segment in zip(starts, segments, strict=False):
        row, first = divmod(start, tokens)
        own = slice(first, first + segment.length)
        mask[row, 0, own, own] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
        root = starts[segment.root] % tokens
        mask[row, 0, own, root : root + segment.seen] = True
    return mask


def attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v over what the plan shows, softmax accumulated in fp32.

    Returns:
        The heads' outputs, [B, T, N, D].
    """
    if plan.varlen is not None:
        return _attend_varlen(q_BTND, k_BSND, v_BSND, plan.varlen)
    if plan.segments is not None:
        return _attend_segments(q_BTND, k_BSND, v_BSND, plan, plan.segments)
    tokens, past = q_BTND.shape[1], k_BSND.shape[1] - q_BTND.shape[1]
    mask = plan.mask_B1TS
    if mask is None and tokens > 1 and past > 0:
        mask = _causal_after(tokens, past, q_BTND.device)
    return _attend_rows(q_BTND, k_BSND, v_BSND, mask, causal=mask is None and tokens > 1)


def _attend_rows(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_BTND.dtype)
    o_BNTD = scaled_dot_product_attention(
        q_BTND.transpose(1, 2),
        k_BSND.transpose(1, 2),
        v_BSND.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
    )
    return o_BNTD.transpose(1, 2)


def _attend_segments(
    q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, plan: AttentionPlan, segments: tuple[Segment, ...]
) -> Tensor:
    """Each segment on its own; `split`, because each slice's backward would fill a whole row."""
    lengths = [segment.length for segment in segments]
    q_s, k_s, v_s = (
        x_BTND.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x_BTND in (q_BTND, k_BTND, v_BTND)
    )
    outputs = []
    for segment, q, k, v in zip(segments, q_s, k_s, v_s, strict=True):
        mask = plan.mask_of(segment, q.device)
        if segment.seen:
            k = torch.cat((k_s[segment.root][:, : segment.seen], k), dim=1)  # noqa: PLW2901
            v = torch.cat((v_s[segment.root][:, : segment.seen], v), dim=1)  # noqa: PLW2901
        outputs.append(_attend_rows(q, k, v, mask, causal=mask is None and segment.length > 1))
    return torch.cat(outputs, dim=1).reshape(q_BTND.shape)


def _attend_varlen(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, plan: VarlenPlan) -> Tensor:
    """All segments in one call of flash_attn."""
    flash: Any = import_module("flash_attn")
    q_MND, k_MND, v_MND = (x_BTND.flatten(0, 1) for x_BTND in (q_BTND, k_BTND, v_BTND))
    if plan.keys_K is not None:
        k_MND, v_MND = k_MND.index_select(0, plan.keys_K), v_MND.index_select(0, plan.keys_K)
    o_MND: Tensor = flash.flash_attn_varlen_func(
        q_MND,
        k_MND,
        v_MND,
        plan.query_ends,
        plan.key_ends,
        plan.most_queries,
        plan.most_keys,
        causal=True,
    )
    return o_MND.view(q_BTND.shape)


def _causal_after(tokens: int, past: int, device: torch.device) -> Tensor:
    """[T, S] mask of tokens that follow `past` others: SDPA's own causal flag would align the first ones."""
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
