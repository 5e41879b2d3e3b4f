"""How the tokens of one call lie in their rows: padding, documents, cache. Decided once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yuan2_model.attention import AttentionPlan, plan_documents
from yuan2_model.cache import Yuan2Cache


@dataclass(frozen=True)
class Layout:
    """What every layer must know of a call's tokens; None stands for the simple case, which costs nothing."""

    positions_BT: Tensor
    """Rotary positions; a single row where all rows are alike."""
    attention: AttentionPlan
    starts_BT: Tensor | None = None
    """True at a sequence's first token when it is not the row's: the filter does not look back from there."""
    last_B: Tensor | None = None
    """Column of each row's last real token, -1 where a row has none; None: the last column."""
    valid_BS: Tensor | None = None
    """False in the padding, the cache's columns included; None where there is none."""


def lay_out(
    tokens_BT: Tensor,
    cache: Yuan2Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
) -> Layout:
    """Work out positions, visibility and filter borders of a call.

    Args:
        tokens_BT: anything with the call's first two dimensions, on its device.
        cache: what came before, or None.
        attention_mask: [B, S] or [B, T], 0 in padding at the left or right of the call's rows; or [B, 1, T,
            S], which goes to attention as it is (True or 0.0 where a query sees a key) and leaves filter and
            positions alone.
        position_ids: [B, T] or [1, T], instead of the tokens' count since their sequence began.
        document_ids: [B, T], equal within a document of a packed row; with no cache.

    Raises:
        ValueError: shapes that do not fit, or documents with a cache.
    """
    batch, tokens = tokens_BT.shape[:2]
    past = 0 if cache is None else cache.length
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {(batch, tokens)}")
    if document_ids is not None:
        layout = _documents(document_ids, attention_mask, (batch, tokens), past)
    elif attention_mask is not None and attention_mask.dim() == 4:
        layout = _explicit(attention_mask, (batch, tokens), past)
    else:
        valid_BS = _validity(attention_mask, cache, (batch, tokens))
        layout = _plain(tokens_BT, past) if valid_BS is None else _padded(valid_BS, past)
    if position_ids is None:
        return layout
    return Layout(position_ids, layout.attention, layout.starts_BT, layout.last_B, layout.valid_BS)


def _plain(tokens_BT: Tensor, past: int) -> Layout:
    positions_1T = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
    return Layout(positions_1T, AttentionPlan())


def _explicit(mask_B1TS: Tensor, shape: tuple[int, int], past: int) -> Layout:
    batch, tokens = shape
    expected = (batch, 1, tokens, past + tokens)
    if tuple(mask_B1TS.shape) != expected:
        raise ValueError(f"attention_mask has shape {tuple(mask_B1TS.shape)}, expected {expected}")
    if not mask_B1TS.is_floating_point():
        mask_B1TS = mask_B1TS.bool()
    plain = _plain(mask_B1TS[:, 0], past)
    return Layout(plain.positions_BT, AttentionPlan(mask_B1TS))


def _validity(mask: Tensor | None, cache: Yuan2Cache | None, shape: tuple[int, int]) -> Tensor | None:
    """[B, S], True at real tokens, or None where every token is real."""
    batch, tokens = shape
    past = 0 if cache is None else cache.length
    seen = None if cache is None else cache.valid_BS
    if mask is None and seen is None:
        return None
    if mask is None:
        assert seen is not None
        mask = seen.new_ones(batch, tokens)
    mask = mask.bool()
    if tuple(mask.shape) not in ((batch, tokens), (batch, past + tokens)):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, "
            f"expected {(batch, tokens)} or {(batch, past + tokens)}"
        )
    if mask.shape[1] == tokens and past:
        mask = torch.cat((mask.new_ones(batch, past) if seen is None else seen, mask), dim=1)
    return None if bool(mask.all()) else mask


def _padded(valid_BS: Tensor, past: int) -> Layout:
    valid_BT = valid_BS[:, past:]
    columns_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    last_B = torch.where(valid_BT, columns_T, -1).amax(dim=1)
    if past == 0 and not bool((valid_BS[:, 1:] > valid_BS[:, :-1]).any()):
        # Padding at the right only: causality alone hides it from every real token.
        return Layout(columns_T.unsqueeze(0), AttentionPlan(), None, last_B, valid_BS)
    positions_BT = (valid_BS.cumsum(dim=1) - 1).clamp_min(0)[:, past:]
    starts_BT = valid_BT.clone()
    starts_BT[:, 0] = False
    starts_BT[:, 1:] &= ~valid_BT[:, :-1]
    mask_B1TS = AttentionPlan(_causal_and_valid(valid_BS, past))
    return Layout(positions_BT, mask_B1TS, starts_BT, last_B, valid_BS)


def _causal_and_valid(valid_BS: Tensor, past: int) -> Tensor:
    """Real keys up to the query itself; padding sees itself, for a softmax over nothing is not a number."""
    length = valid_BS.shape[1]
    columns_S = torch.arange(length, device=valid_BS.device)
    queries_T1 = columns_S[past:, None]
    visible_BTS = (columns_S <= queries_T1) & valid_BS[:, None, :]
    return (visible_BTS | (columns_S == queries_T1)).unsqueeze(1)


def _documents(ids_BT: Tensor, mask: Tensor | None, shape: tuple[int, int], past: int) -> Layout:
    if past:
        raise ValueError(
            "document_ids cannot be combined with past_key_values: decode each document by itself"
        )
    if tuple(ids_BT.shape) != shape or (mask is not None and tuple(mask.shape) != shape):
        raise ValueError(f"document_ids and attention_mask must have shape {shape}, as the tokens have")
    border_BT = torch.ones(shape, dtype=torch.bool, device=ids_BT.device)
    border_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    if mask is not None:
        border_BT[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    columns_T = torch.arange(shape[1], device=ids_BT.device)
    positions_BT = columns_T - torch.where(border_BT, columns_T, 0).cummax(dim=1).values
    first = border_BT.flatten().nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in zip(first, [*first[1:], ids_BT.numel()], strict=True)]
    starts_BT = border_BT.clone()
    starts_BT[:, 0] = False
    return Layout(positions_BT, plan_documents(border_BT.cumsum(dim=1), lengths), starts_BT)
