"""A rank's fragments in one safetensors file, written once through a checksum and read by slices."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from yuan2_trainer.checkpoint.fragments import KINDS, Fragment
from yuan2_trainer.checkpoint.manifest import Found, ShardFile


def key_of(name: str, kind: str) -> str:
    """Name of a tensor in a shard: no parameter name contains `#`."""
    return f"{name}#{kind}"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(path: Path, fragments: Iterable[Fragment]) -> ShardFile:
    """Write and sync a file of fp32 fragments.

    safetensors' own writer hides the error number of a full disk and needs a second pass for the checksum,
    hence this one: 8 bytes of header length, a JSON header, then the tensors
    (https://huggingface.co/docs/safetensors).

    Raises:
        OSError: the file cannot be written, `ENOSPC` included.
    """
    held = list(fragments)
    stream = _HashingWriter(path)
    with stream.file:
        stream.write(_header(held))
        for fragment in held:
            for kind in KINDS:
                stream.write(_bytes_of(fragment.views[kind]))
        stream.file.flush()
        os.fsync(stream.file.fileno())
    places = {fragment.name: (fragment.start, fragment.numel) for fragment in held}
    return ShardFile(size=stream.size, sha256=stream.digest.hexdigest(), fragments=places)


class ShardReader:
    """Reads any range of any parameter from the files of a checkpoint, whatever ranks wrote them."""

    def __init__(self, found: Found) -> None:
        self.manifest = found.manifest
        self._directory = found.directory
        self._files: dict[str, Any] = {}
        """Those that were read from so far."""
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for file_name, file in self.manifest.files.items():
            for name, (start, numel) in file.fragments.items():
                self._pieces.setdefault(name, []).append((start, numel, file_name))

    def fill(self, target: Tensor, name: str, kind: str, start: int) -> None:
        """Copy elements [start, start + target.numel()) of a parameter into a 1-D tensor."""
        end = start + target.numel()
        for first, numel, file_name in self._pieces[name]:
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                piece = self._file(file_name).get_slice(key_of(name, kind))[low - first : high - first]
                target[low - start : high - start].copy_(piece)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self._directory / name, framework="pt")
        return self._files[name]

    def full(self, name: str) -> Tensor:
        """The fp32 weights of a parameter in their shape, on the CPU."""
        shape = self.manifest.shapes[name]
        value = torch.empty(shape, dtype=torch.float32)
        self.fill(value.view(-1), name, "master", 0)
        return value


class _HashingWriter:
    def __init__(self, path: Path) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _header(fragments: list[Fragment]) -> bytes:
    entries: dict[str, object] = {}
    offset = 0
    for fragment in fragments:
        for kind in KINDS:
            end = offset + 4 * fragment.numel
            entries[key_of(fragment.name, kind)] = {
                "dtype": "F32",
                "shape": [fragment.numel],
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(view: Tensor) -> memoryview:
    values = view.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return values.numpy().data.cast("B") if values.numel() else memoryview(b"")
