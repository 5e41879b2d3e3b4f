"""What a model must know of a training call's rows, worked out on the host, which then never waits for the
device."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from yuan2_core.conversation import IGNORED
from yuan2_model.layout import Layout, lay_out
from yuan2_model.loss import shifted_labels

_T = TypeVar("_T")


@dataclass(frozen=True)
class Rows:
    """The tokens of a call, how they lie, and what is learned of them, on the device that computes."""

    input_ids: Tensor
    """[B, T]."""
    layout: Layout
    outputs_L: Tensor
    """The tokens whose following one is learned, among all tokens of the rows."""
    next_1L: Tensor
    """What follows each of them."""


def prepare_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    previous_ids: Tensor | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Rows:
    """Work out a call from tensors on the host; arguments as those of `Yuan2ForCausalLM.forward`.

    Args:
        input_ids, labels, attention_mask, document_ids, previous_ids: [B, T], on the CPU.
        device: where the model is.
        dtype: of its weights.

    Raises:
        ValueError: shapes that do not fit.
    """
    shaped = torch.empty((*input_ids.shape, 0), dtype=dtype)
    layout = lay_out(shaped, None, attention_mask, None, document_ids, previous_ids, device)
    next_N = shifted_labels(labels, layout.starts_S).flatten()
    outputs_L = (next_N != IGNORED).nonzero().flatten()
    return _moved(Rows(input_ids, layout, outputs_L, next_N[outputs_L].unsqueeze(0)), device)


def _moved(value: _T, device: torch.device) -> _T:
    """The tensors of a dataclass, and of those in it, on another device; nobody waits for their copies."""
    if device.type == "cpu" or not is_dataclass(value):
        return value
    changes: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            pinned = item.pin_memory() if device.type == "cuda" else item
            changes[field.name] = pinned.to(device, non_blocking=True)
        elif field.init and is_dataclass(item):
            changes[field.name] = _moved(item, device)
    return replace(value, **changes)  # type: ignore[type-var]
