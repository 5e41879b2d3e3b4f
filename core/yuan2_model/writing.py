"""Writing a model directory so that a reader sees the old model, none, or the new one: never a mixture."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from yuan2_core.durable import sync
from yuan2_model.config import Yuan2Config
from yuan2_model.dimensions import EMBEDDING, HEAD, IGNORED_SUFFIX, tensor_shapes
from yuan2_model.files import (
    BIN_FILE,
    BIN_INDEX,
    CONFIG_FILE,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    check_names,
    check_shape,
)

DEFAULT_SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_READABLE = 0o644
_WEIGHT_FILES = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


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
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        names = _write_weights(tensors, stage, _bytes(max_shard_size))
        _write_text(stage / CONFIG_FILE, _config_text(config, tensors[EMBEDDING], root))
        _publish(stage, root, names)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _complete_tensors(state: Mapping[str, Tensor], config: Yuan2Config) -> dict[str, Tensor]:
    """The tensors to write in published order, `lm_head.weight` with memory of its own."""
    dimensions = config.dimensions()
    given = {name: tensor for name, tensor in state.items() if not name.endswith(IGNORED_SUFFIX)}
    check_names(given, dimensions, "save_model")
    for name, tensor in given.items():
        check_shape(name, tuple(tensor.shape), dimensions, "save_model")
    head = given.get(HEAD)
    if head is None or head.data_ptr() == given[EMBEDDING].data_ptr():
        given[HEAD] = given[EMBEDDING].detach().clone()
    return {name: given[name].detach().contiguous() for name in tensor_shapes(dimensions)}


def _write_weights(tensors: Mapping[str, Tensor], stage: Path, limit: int) -> list[str]:
    """Write one file, or shards and their index; return the names, the index last."""
    groups = list(_shards(tensors, limit))
    if len(groups) == 1:
        _write_shard(stage / SAFETENSORS_FILE, groups[0])
        return [SAFETENSORS_FILE]
    weight_map = {}
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        _write_shard(stage / name, group)
        weight_map.update(dict.fromkeys(group, name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(stage / SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")
    return [*names, SAFETENSORS_INDEX]


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Fill shards in order; a tensor larger than the limit gets a shard of its own."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if group and size + bytes_ > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += bytes_
    yield group


def _write_shard(path: Path, group: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(group), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells the system's error number in its text only; a caller wants to know a full volume.
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    # The library makes files that only their writer may read; a model is read by other pods and people.
    path.chmod(_READABLE)
    sync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _config_text(config: Yuan2Config, embedding: Tensor, root: Path) -> str:
    document = config.published() | {"torch_dtype": str(embedding.dtype).removeprefix("torch.")}
    if (code := document.pop("auto_map", None)) and _code_is_there(code, root):
        document["auto_map"] = code
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


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
