"""What the models return: transformers' outputs and a field of our own each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from yuan2_model.cache import Yuan2Cache

_RENAMED: Final = "cache" in {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_NAME: Final = "cache" if _RENAMED else "past_key_values"
"""What the installed transformers calls a cache in outputs and in `generate`: renamed within version 5."""


@dataclass
class Yuan2Output(CausalLMOutputWithPast):
    """transformers' output and the number of labelled positions, which turns a sum into a mean."""

    labelled: int | None = None

    if _RENAMED:

        @property
        def past_key_values(self) -> Yuan2Cache | None:
            """The cache, without transformers' warning of the older name: here it is the name."""
            return self.cache


@dataclass
class DecodedOutput(BaseModelOutputWithPast):
    """transformers' output and, given labels, the label of what follows each of its positions."""

    next_ids: Tensor | None = None
    every: bool | None = None
    """True: all of `next_ids` are learned, and there are no others in it."""

    if _RENAMED:

        @property
        def past_key_values(self) -> Yuan2Cache | None:
            """As of `Yuan2Output`."""
            return self.cache
