"""A model that ZeRO-3 cuts into pieces while it is loaded: no rank ever holds more than one whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yuan2_model import Yuan2ForCausalLM, check_model_directory
from yuan2_model.dimensions import HEAD
from yuan2_model.weights import load_config, read_tensors


def load_partitioned(directory: Path, config: dict[str, Any]) -> Yuan2ForCausalLM:
    """Load a model directory, each tensor cut at once into a piece a rank; all ranks take part.

    Args:
        directory: the model directory.
        config: DeepSpeed's configuration; it decides the type of the weights too.

    Raises:
        ModelFilesError: as `yuan2_model.load_model`.
    """
    import deepspeed

    facts = check_model_directory(directory)
    # No `dtype`: where the accelerator knows no fp16, DeepSpeed takes bf16 in place of what is given (ADR 8).
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Yuan2ForCausalLM(load_config(facts))
    tied = facts.dimensions.tie_word_embeddings
    fill(model, (item for item in read_tensors(facts) if not (tied and item[0] == HEAD)))
    return model


def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set parameters by name; under ZeRO-3 rank 0's values are spread, and all ranks pass the same names."""
    parameters = dict(model.named_parameters())
    for name, value in values:
        with _gathered(parameters[name], 0), torch.no_grad():
            parameters[name].copy_(value)


def gathered(parameter: Any) -> AbstractContextManager[None]:
    """Inside, a parameter of ZeRO-3 is whole; any other is as it was. All ranks take part."""
    return _gathered(parameter, None)


def _gathered(parameter: Any, modifier_rank: int | None) -> AbstractContextManager[None]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank
    )
    return context
