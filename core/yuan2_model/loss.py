"""Cross-entropy that touches only labelled positions and holds only a chunk of logits at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yuan2_core.conversation import IGNORED

_CHUNK_LOGITS = 1 << 26
"""Logits held at once, 256 MiB in fp32: 496 tokens of the published vocabulary."""
_SCALED_AT_ONCE = 1 << 24
"""Numbers that are in fp32 for a moment when a gradient is scaled."""


class LossSum(NamedTuple):
    """Sum of the losses over labelled positions, fp32 and differentiable, and how many there are."""

    total: Tensor
    labelled: int

    def mean(self) -> Tensor:
        """The mean over labelled positions; 0 where nothing is labelled."""
        return self.total / max(self.labelled, 1)


def shifted_labels(labels_BT: Tensor, starts_S: Tensor | None = None) -> Tensor:
    """Label of what follows each token, [B, T]; that of a sequence's first token follows nothing: ignored.

    Args:
        labels_BT: label of each token.
        starts_S: first tokens inside rows, among all tokens of the rows.
    """
    if starts_S is not None:
        labels_BT = labels_BT.flatten().index_fill(0, starts_S, IGNORED).view_as(labels_BT)
    ends_B1 = labels_BT.new_full((labels_BT.shape[0], 1), IGNORED)
    return torch.cat((labels_BT[:, 1:], ends_B1), dim=1)


def labelled_losses(
    hidden_BTH: Tensor, weight_VH: Tensor, next_BT: Tensor, chunk: int | None = None, every: bool = False
) -> Tensor:
    """Cross-entropy of each labelled position, [L] fp32 in their order; otherwise as `labelled_loss_sum`.

    The gradient may differ from position to position, so logits are multiplied out again in the backward
    pass, a chunk at a time.
    """
    labels_L, hidden_LH = _labelled(hidden_BTH, next_BT, every)
    if chunk is None:
        chunk = max(1, _CHUNK_LOGITS // weight_VH.shape[0])
    losses: Tensor = _LabelledLosses.apply(hidden_LH.to(weight_VH.dtype), weight_VH, labels_L, chunk)
    return losses


class _LabelledLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, chunk: int) -> Tensor:
        losses_L = torch.empty(len(labels_L), dtype=torch.float32, device=hidden_LH.device)
        with torch.autocast(hidden_LH.device.type, enabled=False):
            for start in range(0, hidden_LH.shape[0], chunk):
                rows = slice(start, start + chunk)
                losses_L[rows] = _losses_and_softmax(hidden_LH[rows] @ weight_VH.T, labels_L[rows, None])[0]
        ctx.save_for_backward(hidden_LH, weight_VH, labels_L)
        ctx.chunk = chunk
        return losses_L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, labels_L = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_LH) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        with torch.autocast(hidden_LH.device.type, enabled=False):
            for start in range(0, hidden_LH.shape[0], ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                hidden_CH, labels_C1 = hidden_LH[rows], labels_L[rows, None]
                logits_CV = _losses_and_softmax(hidden_CH @ weight_VH.T, labels_C1)[1]
                logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, -1.0))
                logits_CV.mul_(grad_L[rows, None])
                _add_gradients(
                    logits_CV.to(weight_VH.dtype), hidden_CH, weight_VH, rows, hidden_grad, weight_grad
                )
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight_VH.dtype), None, None


def labelled_loss_sum(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    next_BT: Tensor,
    chunk: int | None = None,
    every: bool = False,
    smoothing: float = 0.0,
) -> LossSum:
    """Cross-entropy of `hidden @ weight.T` against the labelled positions, summed.

    The gradients are computed beside the loss, chunk by chunk, so that logits are multiplied out once and
    never kept.

    Args:
        hidden_BTH: outputs of the final norm.
        weight_VH: rows of the output layer.
        next_BT: label of each position (see `shifted_labels`), `IGNORED` where there is none.
        every: all positions are labelled, which need not be looked for then: a GPU would be waited for.
        chunk: labelled tokens whose logits are held at once; absent, as many as make 256 MiB in fp32.
        smoothing: share of each label's weight that is spread evenly over all V rows.
    """
    labels_L, hidden_LH = _labelled(hidden_BTH, next_BT, every)
    hidden_LH = hidden_LH.to(weight_VH.dtype)
    if not torch.is_grad_enabled():
        # A weight that is a parameter would ask for its gradient all the same.
        weight_VH = weight_VH.detach()
    if chunk is None:
        chunk = max(1, _CHUNK_LOGITS // weight_VH.shape[0])
    total = _LabelledLoss.apply(hidden_LH, weight_VH, labels_L, chunk, smoothing)
    return LossSum(total, labels_L.numel())


def _labelled(hidden_BTH: Tensor, next_BT: Tensor, every: bool) -> tuple[Tensor, Tensor]:
    """The labels that count, [L], and what they are scored against, [L, H]."""
    labels_N, hidden_NH = next_BT.flatten(), hidden_BTH.flatten(0, 1)
    if every:
        return labels_N, hidden_NH
    labelled_L = (labels_N != IGNORED).nonzero().flatten()
    return labels_N[labelled_L], hidden_NH.index_select(0, labelled_L)


class _LabelledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_LH: Tensor, weight_VH: Tensor, labels_L: Tensor, chunk: int, smoothing: float
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_LH) if wants_hidden else None
        # fp32, because a sum of many chunks would lose its small terms in bf16.
        weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_LH.device)
        with torch.autocast(hidden_LH.device.type, enabled=False):
            for start in range(0, hidden_LH.shape[0], chunk):
                rows = slice(start, start + chunk)
                hidden_CH, labels_C1 = hidden_LH[rows], labels_L[rows, None]
                losses_C, logits_CV = _losses_and_softmax(hidden_CH @ weight_VH.T, labels_C1, smoothing)
                total += losses_C.sum()
                if not (wants_hidden or wants_weight):
                    continue
                logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, smoothing - 1.0))
                if smoothing:
                    logits_CV.sub_(smoothing / logits_CV.shape[1])
                _add_gradients(
                    logits_CV.to(weight_VH.dtype), hidden_CH, weight_VH, rows, hidden_grad, weight_grad
                )
        ctx.hidden_grad = hidden_grad
        ctx.weight_grad = None if weight_grad is None else weight_grad.to(weight_VH.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: at this vocabulary another copy of the weight's gradient is the largest tensor of a step.
        if not hasattr(ctx, "hidden_grad"):
            raise RuntimeError("the gradients of this loss were taken already: compute it again")
        grads = tuple(None if x is None else _scale(x, grad) for x in (ctx.hidden_grad, ctx.weight_grad))
        del ctx.hidden_grad, ctx.weight_grad
        return (*grads, None, None, None)


def _scale(rows_RC: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place by an fp32 number, which bf16 would round: by up to 0.4%, the same for all."""
    if rows_RC.dtype == factor.dtype:
        return rows_RC.mul_(factor)
    for part in rows_RC.split(max(1, _SCALED_AT_ONCE // rows_RC.shape[1])):
        part.copy_(part.to(factor.dtype).mul_(factor))
    return rows_RC


def _losses_and_softmax(
    logits_CV: Tensor, labels_C1: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk and its softmax, which takes the place of the logits."""
    logits_CV = logits_CV.float()
    highest_C1 = logits_CV.amax(dim=1, keepdim=True)
    target_C1 = logits_CV.gather(1, labels_C1) - highest_C1
    if smoothing:
        mean_C1 = logits_CV.mean(dim=1, keepdim=True) - highest_C1
        target_C1 = (1 - smoothing) * target_C1 + smoothing * mean_C1
    scale_C1 = logits_CV.sub_(highest_C1).exp_().sum(dim=1, keepdim=True)
    return (scale_C1.log() - target_C1).squeeze(1), logits_CV.div_(scale_C1)


def _add_gradients(
    logits_grad_CV: Tensor,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    rows: slice,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> None:
    if hidden_grad is not None:
        torch.mm(logits_grad_CV, weight_VH, out=hidden_grad[rows])
    if weight_grad is None:
        return
    if weight_grad.dtype == logits_grad_CV.dtype:
        weight_grad.addmm_(logits_grad_CV.T, hidden_CH)
    else:
        weight_grad += logits_grad_CV.T @ hidden_CH
