"""A model that ZeRO-3 cuts into pieces while it is loaded: no rank ever holds more than one whole tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yuan2_model import Yuan2ForCausalLM, check_model_directory
from yuan2_model.weights import load_config
from yuan2_trainer.model.spreading import fill, untied_names, untied_tensors


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
    fill(model, (tensor for _, tensor in untied_tensors(facts)), untied_names(facts))
    return model
