"""How the tokens of one call lie in their rows: padding, documents, cache. Decided once for all layers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yuan2_model.attention import AttentionPlan, Segment, plan_segments
from yuan2_model.cache import Yuan2Cache


@dataclass(frozen=True)
class Layout:
    """What every layer must know of a call's tokens; None stands for the simple case, which costs nothing."""

    positions_BT: Tensor
    """Rotary positions; a single row where all rows are alike."""
    attention: AttentionPlan
    starts_S: Tensor | None = None
    """Sequences' first tokens that are not their row's, among all tokens of the call's rows: the filter does
    not look back from there."""
    last_B: Tensor | None = None
    """Column of each row's last real token, -1 where a row has none; None: the last column."""
    valid_BS: Tensor | None = None
    """False in the padding, the cache's columns included; None where there is none."""
    forks: Forks | None = None
    """Where sequences leave a beginning that they share with another one."""
    outputs_L: Tensor | None = None
    """For the last layer: the tokens, among all of the call's rows, whose outputs anyone reads; None: all."""


@dataclass(frozen=True)
class Forks:
    """Places among all tokens of a call's rows, one row after the other."""

    first: Tensor
    """First token of each sequence's own."""
    before: Tensor
    """The token that comes before it, in the sequence that it shares its beginning with."""


def lay_out(
    tokens_BT: Tensor,
    cache: Yuan2Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    previous_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Layout:
    """Work out positions, visibility and filter borders of a call.

    Args:
        tokens_BT: anything with the call's first two dimensions, on its device and in its type.
        cache: what came before, or None.
        attention_mask: [B, S] or [B, T], 0 in padding at the left or right of the call's rows; or [B, 1, T,
            S], which goes to attention as it is (True or 0.0 where a query sees a key) and leaves filter and
            positions alone.
        position_ids: [B, T] or [1, T], instead of the tokens' count since their sequence began.
        document_ids: [B, T], equal within a document of a packed row; with no cache.
        previous_ids: [B, T], instead of `document_ids`, where sequences share a beginning: the column of the
            token before each one in its sequence, -1 at the first.
        device: what attention is computed on, where that is not the tensors' own.

    Raises:
        ValueError: shapes that do not fit, or documents with a cache.
    """
    batch, tokens = tokens_BT.shape[:2]
    past = 0 if cache is None else cache.length
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {(batch, tokens)}")
    if document_ids is not None or previous_ids is not None:
        layout = _packed(tokens_BT, document_ids, previous_ids, attention_mask, past, device)
    elif attention_mask is not None and attention_mask.dim() == 4:
        layout = _explicit(attention_mask, (batch, tokens), past)
    else:
        valid_BS = _validity(attention_mask, cache, (batch, tokens))
        layout = _plain(tokens_BT, past) if valid_BS is None else _padded(valid_BS, past)
    if position_ids is None:
        return layout
    return replace(layout, positions_BT=position_ids)


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
    border_BT = valid_BT.clone()
    border_BT[:, 1:] &= ~valid_BT[:, :-1]
    mask_B1TS = AttentionPlan(_causal_and_valid(valid_BS, past))
    return Layout(positions_BT, mask_B1TS, _inner(border_BT), last_B, valid_BS)


def _causal_and_valid(valid_BS: Tensor, past: int) -> Tensor:
    """Real keys up to the query itself; padding sees itself, for a softmax over nothing is not a number."""
    length = valid_BS.shape[1]
    columns_S = torch.arange(length, device=valid_BS.device)
    queries_T1 = columns_S[past:, None]
    visible_BTS = (columns_S <= queries_T1) & valid_BS[:, None, :]
    return (visible_BTS | (columns_S == queries_T1)).unsqueeze(1)


def _packed(
    tokens_BT: Tensor,
    document_ids: Tensor | None,
    previous_ids: Tensor | None,
    mask: Tensor | None,
    past: int,
    device: torch.device | None,
) -> Layout:
    shape = tuple(tokens_BT.shape[:2])
    if past:
        raise ValueError(
            "document_ids cannot be combined with past_key_values: decode each document by itself"
        )
    if document_ids is not None and previous_ids is not None:
        raise ValueError("document_ids and previous_ids both say what a token follows: give one")
    if any(x is not None and tuple(x.shape) != shape for x in (document_ids, previous_ids, mask)):
        raise ValueError(
            f"document_ids, previous_ids and attention_mask must have shape {shape}, as the tokens have"
        )
    if previous_ids is not None:
        return _tree(tokens_BT, previous_ids, device)
    assert document_ids is not None
    return _documents(tokens_BT, document_ids, mask, device)


def _documents(tokens_BT: Tensor, ids_BT: Tensor, mask: Tensor | None, device: torch.device | None) -> Layout:
    border_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    border_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    if mask is not None:
        border_BT[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    positions_BT = columns_T - torch.where(border_BT, columns_T, 0).cummax(dim=1).values
    first = border_BT.flatten().nonzero().flatten().tolist()
    segments = [
        Segment(stop - start) for start, stop in zip(first, [*first[1:], ids_BT.numel()], strict=True)
    ]
    plan = plan_segments(segments, ids_BT, tokens_BT.dtype, device)
    return Layout(positions_BT, plan, _inner(border_BT))


def _tree(tokens_BT: Tensor, previous_BT: Tensor, device: torch.device | None) -> Layout:
    """Sequences of which some continue the beginning of another one, which is in the row only once."""
    batch, tokens = previous_BT.shape
    columns_T = torch.arange(tokens, device=previous_BT.device)
    border_BT = previous_BT != columns_T - 1
    border_BT[:, 0] = True
    first_S = border_BT.flatten().nonzero().flatten()
    firsts = first_S.tolist()
    rows = [first - first % tokens for first in firsts]
    before = [
        -1 if column < 0 else row + column
        for row, column in zip(rows, previous_BT.flatten()[first_S].tolist(), strict=True)
    ]
    segments = _segments(firsts, before, batch * tokens)
    offsets_S = torch.tensor([segment.seen for segment in segments], device=columns_T.device) - first_S
    places_BT = torch.arange(batch * tokens, device=columns_T.device).view(batch, tokens)
    positions_BT = places_BT + offsets_S[border_BT.flatten().cumsum(0) - 1].view(batch, tokens)
    forks = [(first, place) for first, place in zip(firsts, before, strict=True) if place >= 0]
    if forks:
        first_F, before_F = (
            torch.tensor(places, device=columns_T.device) for places in zip(*forks, strict=True)
        )
    return Layout(
        positions_BT,
        plan_segments(segments, previous_BT, tokens_BT.dtype, device),
        _inner(border_BT),
        forks=Forks(first_F, before_F) if forks else None,
    )


def _segments(firsts: Sequence[int], before: Sequence[int], end: int) -> list[Segment]:
    """Segments from their first tokens and the tokens before those, -1 where there is none.

    Raises:
        ValueError: one would continue what is not a sequence of its own, earlier in its row.
    """
    segments: list[Segment] = []
    for first, stop, place in zip(firsts, [*firsts[1:], end], before, strict=True):
        if place < 0:
            segments.append(Segment(stop - first))
            continue
        root = bisect_right(firsts, place) - 1
        if root >= len(segments) or segments[root].seen:
            raise ValueError(
                "previous_ids: a sequence can only continue one that lies before it and continues none"
            )
        segments.append(Segment(stop - first, root, place - firsts[root] + 1))
    return segments


def _inner(border_BT: Tensor) -> Tensor:
    """Places of the borders inside rows: what is before a row's first column is nothing in any case."""
    places_S = border_BT.flatten().nonzero().flatten()
    return places_S[places_S % border_BT.shape[1] > 0]
