"""LoRA adapters in a model's layers, through PEFT: finding them, adding them to the weights, loading them."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from yuan2_model.errors import ModelFilesError
from yuan2_model.model import Yuan2ForCausalLM

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def merge_layers(model: nn.Module) -> None:
    """Add each adapter to the weights beside it."""
    for _, layer in adapted_layers(model):
        merge_layer(layer)


def merge_layer(layer: Any) -> None:
    """Add an adapter to the weights beside it: summed in fp32, rounded once to the weights' type."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    layer.float()
    layer.merge()
    base.to(dtype)


def with_adapter(model: Yuan2ForCausalLM, directory: str | PathLike[str]) -> Yuan2ForCausalLM:
    """A model with the adapter of a directory in PEFT's layout added to its weights.

    Raises:
        ModelFilesError: the directory is no adapter to this model; one line that names it.
    """
    root = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (root / name).is_file():
            raise ModelFilesError(f"{root}: {name} is missing; give the adapter directory of a LoRA run")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelFilesError(f"{root}: an adapter needs the package peft: {error}") from error
    try:
        adapted = PeftModel.from_pretrained(model, str(root))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:400]
        raise ModelFilesError(
            f"{root}: does not fit the model: {problem}; serve the model it was trained on"
        ) from None
    merge_layers(adapted)
    merged: Yuan2ForCausalLM = adapted.unload()
    return merged
