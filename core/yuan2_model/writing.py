"""Writes a model directory so that a reader finds the old model, none, or the new one: never a mixture.

Tensor by tensor: a caller that has only one of them at a time, as a run whose weights are cut over many
ranks, writes with `plan_model`, `ShardWriter` and `describe`; `save_model` is for a whole model in memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from yuan2_core.durable import sync
from yuan2_model.config import Yuan2Config
from yuan2_model.dimensions import EMBEDDING, HEAD, IGNORED_SUFFIX, tensor_shapes
from yuan2_model.errors import ModelFilesError
from yuan2_model.files import (
    BIN_FILE,
    BIN_INDEX,
    CONFIG_FILE,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    TensorFact,
    check_names,
    check_shape,
    read_safetensors_header,
)

DEFAULT_SHARD_SIZE = 5_000_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch's types by their name in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


@dataclass(frozen=True)
class ModelPlan:
    """Which tensor will lie in which file."""

    tensors: Mapping[str, TensorFact]
    """In published order; a tied `lm_head.weight` is stored as well."""

    @property
    def shards(self) -> list[str]:
        """Names of the weight files, in order."""
        return list(dict.fromkeys(fact.file for fact in self.tensors.values()))

    def of(self, shard: str) -> dict[str, TensorFact]:
        """The tensors of a file."""
        return {name: fact for name, fact in self.tensors.items() if fact.file == shard}

    def has(self, directory: Path, shard: str) -> bool:
        """Whether a file is there as planned, whole."""
        try:
            return read_safetensors_header(directory / shard) == self.of(shard)
        except ModelFilesError:
            return False


def plan_model(
    config: Yuan2Config,
    dtype_of: Callable[[str], torch.dtype],
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> ModelPlan:
    """Fill files in published order; a tensor larger than the limit gets one of its own.

    Args:
        config: says names and shapes.
        dtype_of: type of a tensor, by its name.
        max_shard_size: bytes, or text such as "5GB".
    """
    limit = _bytes(max_shard_size)
    facts = {
        name: TensorFact("", shape, _NAMES[dtype_of(name)])
        for name, shape in tensor_shapes(config.dimensions()).items()
    }
    groups = list(_groups(facts, limit))
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SAFETENSORS_FILE]
    placed = {}
    for file, group in zip(names, groups, strict=True):
        placed.update({name: TensorFact(file, facts[name].shape, facts[name].dtype) for name in group})
    return ModelPlan(placed)


class ShardWriter:
    """Writes one file of a plan; it takes its name when it is whole and on the disk.

    The format: 8 bytes of header length, a JSON header, then the tensors as they lie in memory
    (https://huggingface.co/docs/safetensors).
    """

    def __init__(self, directory: Path, shard: str, tensors: Mapping[str, TensorFact]) -> None:
        self._path = directory / shard
        self._partial = directory / f".{shard}.partial"
        self._tensors = tensors
        self._left = iter(tensors)

    def __enter__(self) -> ShardWriter:
        self._stream = self._partial.open("wb")
        self._stream.write(_header(self._tensors))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which is the next one of the plan.

        Raises:
            OSError: the volume is full or not writable.
        """
        fact = self._tensors[name]
        assert name == next(self._left), name
        assert (tuple(tensor.shape), _NAMES[tensor.dtype]) == (fact.shape, fact.dtype), name
        flat = tensor.detach().to("cpu").contiguous().flatten()
        with self._named():
            self._stream.write(flat.view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self._named(), self._stream:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._partial.replace(self._path)
        else:
            with suppress(OSError):
                self._stream.close()
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """The system's errors with the file's name, which a stream does not tell."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def describe(plan: ModelPlan, config: Yuan2Config, directory: Path, home: Path | None = None) -> list[str]:
    """Write what stands beside the weights: an index, where there is more than one file, and config.json.

    config.json keeps `auto_map` where `home`, by default the directory itself, has the files that it names.

    Returns:
        The names of weights and index.
    """
    names = plan.shards
    if len(names) > 1:
        total = sum(fact.size for fact in plan.tensors.values())
        weight_map = {name: fact.file for name, fact in plan.tensors.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(directory / SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")
        names = [*names, SAFETENSORS_INDEX]
    dtype = DTYPES[plan.tensors[EMBEDDING].dtype]
    document = config.published() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if (code := document.pop("auto_map", None)) and _code_is_there(code, home or directory):
        document["auto_map"] = code
    _write_text(directory / CONFIG_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return names


def save_model(
    source: nn.Module | Mapping[str, Tensor],
    config: Yuan2Config,
    directory: str | PathLike[str],
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> None:
    """Write config.json and safetensors in the published layout; other files of the directory stay.

    Everything is written beside and synced first. Then config.json of an older model goes, the weights take
    their names, and the new config.json comes last: a directory without one is not a model.

    Args:
        source: a model or its state dict, complete; a tied `lm_head.weight` may be absent, its copy is
            stored.
        config: written with its published names and `torch_dtype` of the embedding; `auto_map` only where
            the directory has the files that it names.
        directory: made where it does not exist.
        max_shard_size: bytes, or text such as "5GB"; a larger model is sharded, with an index.

    Raises:
        ModelFilesError: a tensor is missing, unknown or of the wrong shape.
        OSError: the volume is full or not writable; an older model is then still whole.
    """
    tensors = _complete_tensors(source.state_dict() if isinstance(source, nn.Module) else source, config)
    plan = plan_model(config, lambda name: tensors[name].dtype, max_shard_size)
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        for shard in plan.shards:
            with ShardWriter(stage, shard, plan.of(shard)) as writer:
                for name in plan.of(shard):
                    writer.add(name, tensors[name])
        _publish(stage, root, describe(plan, config, stage, root))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _complete_tensors(state: Mapping[str, Tensor], config: Yuan2Config) -> dict[str, Tensor]:
    """The tensors to write, among them a tied `lm_head.weight`."""
    dimensions = config.dimensions()
    given = {name: tensor for name, tensor in state.items() if not name.endswith(IGNORED_SUFFIX)}
    check_names(given, dimensions, "save_model")
    for name, tensor in given.items():
        check_shape(name, tuple(tensor.shape), dimensions, "save_model")
    return {**given, HEAD: given.get(HEAD, given[EMBEDDING])}


def _groups(facts: Mapping[str, TensorFact], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, fact in facts.items():
        if group and size + fact.size > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += fact.size
    yield group


def _header(tensors: Mapping[str, TensorFact]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, fact in tensors.items():
        end = offset + fact.size
        entries[name] = {"dtype": fact.dtype, "shape": list(fact.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _code_is_there(auto_map: Mapping[str, Any], root: Path) -> bool:
    """Whether all modules that `auto_map` names, as `module.Class`, are files of the directory.

    Programs that run remote code fail on a name without a file instead of using a class of their own.
    """
    classes = [
        name for entry in auto_map.values() for name in (entry if isinstance(entry, list) else [entry])
    ]
    return all((root / f"{name.split('.')[0]}.py").is_file() for name in classes if name)


def _publish(stage: Path, root: Path, names: list[str]) -> None:
    """Swap the staged files in; every step is a rename or a removal, synced before config.json appears."""
    (root / CONFIG_FILE).unlink(missing_ok=True)
    sync(root)
    for old in root.iterdir():
        stale = _WEIGHT_FILES.fullmatch(old.name) or old.name in (SAFETENSORS_INDEX, BIN_INDEX, BIN_FILE)
        if stale and old.name not in names:
            old.unlink()
    for name in names:
        (stage / name).replace(root / name)
    sync(root)
    (stage / CONFIG_FILE).replace(root / CONFIG_FILE)
    sync(root)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        number, unit = size, ""
    else:
        parsed = re.fullmatch(r"(\d+)\s*([KMG]i?B)?", size.strip(), re.IGNORECASE)
        if parsed is None:
            raise ValueError(f"max_shard_size must be bytes or text such as '5GB', found {size!r}")
        number, unit = int(parsed[1]), (parsed[2] or "").upper()
    if number < 1:
        raise ValueError(f"max_shard_size must be positive, found {size!r}")
    return number * _UNITS[unit]
