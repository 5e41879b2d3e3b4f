"""Noise on embeddings in training: NEFTune (arXiv 2310.05914)."""

from __future__ import annotations

import torch
from torch import Tensor

from yuan2_model.layout import Layout


def noise(x_BTH: Tensor, layout: Layout, alpha: float) -> Tensor:
    """Uniform numbers in [-1, 1] times alpha / sqrt(L H), from torch's global generator.

    L is the number of real tokens of the sequence that a token belongs to; sequences that share a beginning
    count as one.
    """
    lengths_BT1 = _lengths(x_BTH, layout).to(torch.float32).unsqueeze(2)
    scale_BT1 = alpha / (lengths_BT1 * x_BTH.shape[2]).sqrt()
    return (torch.empty_like(x_BTH, dtype=torch.float32).uniform_(-1, 1) * scale_BT1).to(x_BTH.dtype)


def _lengths(x_BTH: Tensor, layout: Layout) -> Tensor:
    """Real tokens of each token's sequence, [B, T], at least 1."""
    batch, tokens = x_BTH.shape[:2]
    first_BT = torch.zeros(batch, tokens, dtype=torch.long, device=x_BTH.device)
    first_BT[:, 0] = 1
    if layout.starts_S is not None:
        first_BT.view(-1)[layout.starts_S] = 1
    sequence_N = first_BT.flatten().cumsum(0) - 1
    valid_BS = layout.valid_BS
    real_N = torch.ones_like(sequence_N) if valid_BS is None else valid_BS[:, -tokens:].flatten().long()
    counts = torch.zeros(batch * tokens, dtype=torch.long, device=x_BTH.device)
    return counts.index_add(0, sequence_N, real_N)[sequence_N].clamp(min=1).view(batch, tokens)
