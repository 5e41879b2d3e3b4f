"""A model that ZeRO-3 cuts into pieces while it is loaded: no rank ever holds more than one whole tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from yuan2_model import Yuan2ForCausalLM, check_model_directory
from yuan2_model.weights import load_config, read_tensors


def load_partitioned(directory: Path, dtype: torch.dtype, config: dict[str, Any]) -> Yuan2ForCausalLM:
    """Load a model directory, each tensor cut at once into a piece a rank; all ranks take part.

    Args:
        directory: the model directory.
        dtype: type of the weights.
        config: DeepSpeed's configuration.

    Raises:
        ModelFilesError: as `yuan2_model.load_model`.
    """
    import deepspeed

    facts = check_model_directory(directory)
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype):
        model = Yuan2ForCausalLM(load_config(facts))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in read_tensors(facts):
        if name == "lm_head.weight" and facts.dimensions.tie_word_embeddings:
            continue
        with changed_on_all_ranks(parameters[name]), torch.no_grad():
            parameters[name].copy_(tensor)
    return model


def gathered(parameter: Any) -> AbstractContextManager[None]:
    """Inside, a parameter of ZeRO-3 is whole; any other is as it was. All ranks take part."""
    return _gathered(parameter, None)


def changed_on_all_ranks(parameter: Any) -> AbstractContextManager[None]:
    """As `gathered`, and what rank 0 made of it is kept by all."""
    return _gathered(parameter, 0)


def _gathered(parameter: Any, modifier_rank: int | None) -> AbstractContextManager[None]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=modifier_rank
    )
    return context
