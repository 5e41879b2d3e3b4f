"""The one place where attention is computed, behind `attend`.

Shape legend of this package: B batch rows, T tokens of this call, S tokens with those in the cache, N heads,
D channels of a head, H hidden size, C channels of a convolution, V vocabulary, L labelled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORTEST_LOOPED = 16
"""Mean document length below which one masked product replaces a call for each document.

Measured on one CPU core, rows of 1,024 tokens: the calls take 0.2 of the masked product's time at 16 tokens,
0.4 at 8. The bound is for GPUs, where launching so many small kernels would outlast the product.
"""


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, decided once a forward pass and obeyed by every layer.

    With neither `mask` nor `lengths`, token t of T sees every token of the cache and of this call up to
    itself.
    """

    mask_B1TS: Tensor | None = None
    """True (or an additive float) where a query sees a key; rows broadcast."""
    lengths: tuple[int, ...] | None = None
    """Lengths of the documents of all rows, one after the other: each sees itself only, causally."""


def plan_documents(run_BT: Tensor, lengths: Sequence[int]) -> AttentionPlan:
    """Isolate documents: a call a document where they are long, one block mask where they are short.

    Args:
        run_BT: number of each token's document, rising by one at each border.
        lengths: lengths of the documents over all rows, which sum to B * T.
    """
    if len(lengths) == run_BT.shape[0]:
        return AttentionPlan()
    if run_BT.numel() >= SHORTEST_LOOPED * len(lengths):
        return AttentionPlan(lengths=tuple(lengths))
    same_BTT = run_BT[:, :, None] == run_BT[:, None, :]
    return AttentionPlan(mask_B1TS=same_BTT.tril().unsqueeze(1))


def attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v over what the plan shows, softmax accumulated in fp32.

    Returns:
        The heads' outputs, [B, T, N, D].
    """
    if plan.lengths is not None:
        return _attend_documents(q_BTND, k_BSND, v_BSND, plan.lengths)
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


def _attend_documents(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each document on its own; `split`, because each slice's backward would fill a whole row."""
    pieces = zip(
        *(x_BTND.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x_BTND in (q_BTND, k_BTND, v_BTND)),
        strict=True,
    )
    outputs = [_attend_rows(q, k, v, None, causal=q.shape[1] > 1) for q, k, v in pieces]
    return torch.cat(outputs, dim=1).reshape(q_BTND.shape)


def _causal_after(tokens: int, past: int, device: torch.device) -> Tensor:
    """[T, S] mask of tokens that follow `past` others: SDPA's own causal flag would align the first ones."""
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
