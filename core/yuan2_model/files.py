"""Which files make a model directory and what their headers say. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

from yuan2_model.bins import read_bin_header
from yuan2_model.dimensions import HEAD, IGNORED_SUFFIX, Dimensions, Shape, read_dimensions, tensor_shapes
from yuan2_model.errors import ModelFilesError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes a number of the types that weights may have, by their name in safetensors."""
_NAMED_IN_ERROR = 4
_LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""


@dataclass(frozen=True)
class TensorFact:
    """Where a tensor is and what its header says."""

    file: str
    shape: Shape
    dtype: str
    """As safetensors calls it: F32, BF16, ..."""

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * FLOAT_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelFacts:
    """A model directory whose configuration and headers are right; no tensor was read."""

    directory: Path
    config: Mapping[str, Any]
    """config.json as it stands."""
    dimensions: Dimensions
    tensors: Mapping[str, TensorFact]
    """The published tensors that are there: all of them, or all but a tied `lm_head.weight`."""
    shards: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(fact.size for fact in self.tensors.values())


def check_model_directory(directory: str | PathLike[str]) -> ModelFacts:
    """Check a published model directory from config.json and the weights' headers alone, in milliseconds.

    Raises:
        ModelFilesError: a file, field or tensor is missing, unknown, truncated or of the wrong shape.
    """
    root = Path(directory)
    config = read_config(root)
    dimensions = read_dimensions(config, str(root / CONFIG_FILE))
    shards, index = find_shards(root)
    found: dict[str, TensorFact] = {}
    for shard in shards:
        found.update(_read_header(root / shard))
    for name, shard in index.items():
        if name not in found:
            raise ModelFilesError(
                f"{root / shard}: tensor {name} is missing, though the index places it there"
            )
    tensors = _published_tensors(found, dimensions, root)
    return ModelFacts(root, config, dimensions, tensors, shards)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; raises `ModelFilesError` when it is absent or not a JSON object."""
    if not directory.is_dir():
        raise ModelFilesError(f"{directory}: no such model directory")
    return _read_json_object(directory / CONFIG_FILE)


def find_shards(directory: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the weight files, and the index's tensor-to-file map (empty for a single file).

    safetensors are preferred where a directory holds both kinds.
    """
    for single, index in ((SAFETENSORS_FILE, SAFETENSORS_INDEX), (BIN_FILE, BIN_INDEX)):
        if (directory / single).is_file():
            return (single,), {}
        if (directory / index).is_file():
            return _indexed_shards(directory, index)
    raise ModelFilesError(
        f"{directory}: no weights; expected {SAFETENSORS_FILE} or {BIN_FILE}, or shards with an index"
    )


def _indexed_shards(directory: Path, index: str) -> tuple[tuple[str, ...], dict[str, str]]:
    weight_map = _read_json_object(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise ModelFilesError(
            f"{directory / index}: weight_map must map tensor names to files of this directory"
        )
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        if not (directory / shard).is_file():
            raise ModelFilesError(
                f"{directory / shard}: missing, though {index} names it; copy the whole model"
            )
    return shards, weight_map


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(f"{path}: missing; a model directory in the published layout has one") from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelFilesError(f"{path}: must hold a JSON object, found {type(document).__name__}")
    return document


def _read_header(path: Path) -> dict[str, TensorFact]:
    if path.suffix == ".safetensors":
        return read_safetensors_header(path)
    header = read_bin_header(path)
    return {name: TensorFact(path.name, shape, dtype) for name, (shape, dtype) in header.items()}


def read_safetensors_header(path: Path) -> dict[str, TensorFact]:
    """Names, shapes and types in one file, whose length must be what the header promises."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 2 <= length <= _LARGEST_HEADER else None
        if not isinstance(header, dict):
            raise ValueError("no header")
        header.pop("__metadata__", None)
        facts = {
            name: TensorFact(path.name, tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except OSError as error:
        raise ModelFilesError(f"{path}: cannot be read ({error.strerror}); let this user read it") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelFilesError(
            f"{path}: not a safetensors file or truncated ({error}); copy it again"
        ) from None
    if path.stat().st_size != expected:
        raise ModelFilesError(
            f"{path}: truncated: {path.stat().st_size} bytes, its header promises {expected}; copy it again"
        )
    return facts


def check_names(names: Iterable[str], dimensions: Dimensions, source: str) -> None:
    """Refuse missing and unknown tensors; `lm_head.weight` may be absent while tied to the embedding."""
    present = {name for name in names if not name.endswith(IGNORED_SUFFIX)}
    expected = tensor_shapes(dimensions)
    optional = {HEAD} if dimensions.tie_word_embeddings else set()
    if missing := [name for name in expected if name not in present and name not in optional]:
        raise ModelFilesError(f"{source}: {_listed('missing', missing)}; the model is incomplete")
    if unknown := sorted(present - expected.keys()):
        raise ModelFilesError(f"{source}: {_listed('unknown', unknown)}; this is not a plain Yuan 2.0 model")


def check_shape(name: str, shape: Shape, dimensions: Dimensions, source: str) -> None:
    """Refuse a tensor whose shape is not what config.json says."""
    expected = tensor_shapes(dimensions)[name]
    if tuple(shape) != expected:
        raise ModelFilesError(
            f"{source}: tensor {name} has shape {list(shape)}, but config.json asks for {list(expected)}"
        )


def _published_tensors(
    found: Mapping[str, TensorFact], dimensions: Dimensions, root: Path
) -> dict[str, TensorFact]:
    check_names(found, dimensions, str(root))
    expected = tensor_shapes(dimensions)
    tensors = {name: found[name] for name in expected if name in found}
    for name, fact in tensors.items():
        source = str(root / fact.file)
        if fact.shape != expected[name]:
            check_shape(name, fact.shape, dimensions, source)
        if fact.dtype not in FLOAT_BYTES:
            raise ModelFilesError(
                f"{source}: tensor {name} has type {fact.dtype}, expected one of {[*FLOAT_BYTES]}"
            )
    return tensors


def _listed(problem: str, names: list[str]) -> str:
    rest = len(names) - _NAMED_IN_ERROR
    listed = ", ".join(names[:_NAMED_IN_ERROR]) + (f" and {rest} more" if rest > 0 else "")
    return f"{problem} tensor{'s' if len(names) > 1 else ''} {listed}"
