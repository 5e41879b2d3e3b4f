"""`pytorch_model*.bin` files: read without running what a pickle might hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yuan2_model.dimensions import Shape
from yuan2_model.errors import ModelFilesError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ZIP_MAGIC = b"PK"


def read_bin_header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Shape and type (as safetensors calls it) of each tensor in one file; the numbers stay on disk."""
    return {
        name: (tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in _load(path, device="meta").items()
    }


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped from disk where its format allows: copy what outlives the file."""
    return _load(path, device="cpu")


def _load(path: Path, device: str) -> dict[str, Tensor]:
    try:
        document: Any = torch.load(str(path), map_location=device, weights_only=True, mmap=_is_zip(path))
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        cause = str(error).split("\n", 1)[0]
        raise ModelFilesError(
            f"{path}: truncated, or not a file of plain tensors ({cause}); copy it again"
        ) from None
    if not isinstance(document, dict) or not all(isinstance(value, Tensor) for value in document.values()):
        raise ModelFilesError(f"{path}: must hold a mapping of names to tensors and nothing else")
    return document


def _is_zip(path: Path) -> bool:
    """Whether PyTorch's format since 1.6 was used: the older one cannot be mapped."""
    with path.open("rb") as stream:
        return stream.read(2) == _ZIP_MAGIC
