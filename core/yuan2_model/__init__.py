"""Yuan 2.0 as a transformers model, with its published files; torch is imported when a model is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yuan2_model.cache import Yuan2Cache
    from yuan2_model.config import Yuan2Config
    from yuan2_model.dimensions import Dimensions
    from yuan2_model.errors import ModelFilesError
    from yuan2_model.files import ModelFacts, check_model_directory
    from yuan2_model.model import Yuan2ForCausalLM, Yuan2Model
    from yuan2_model.weights import load_model, load_weights, random_model, save_model

__all__ = [
    "Yuan2Config",
    "Yuan2Model",
    "Yuan2ForCausalLM",
    "Yuan2Cache",
    "load_model",
    "load_weights",
    "save_model",
    "random_model",
    "check_model_directory",
    "ModelFacts",
    "ModelFilesError",
    "Dimensions",
]

_HOMES = {
    "Yuan2Cache": "cache",
    "Yuan2Config": "config",
    "Dimensions": "dimensions",
    "ModelFilesError": "errors",
    "ModelFacts": "files",
    "check_model_directory": "files",
    "Yuan2ForCausalLM": "model",
    "Yuan2Model": "model",
    "load_model": "weights",
    "load_weights": "weights",
    "random_model": "weights",
    "save_model": "weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use: a preflight that reads headers pays for no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
