"""`pytorch_model*.bin` files, read as data: a pickle that wants anything but plain tensors is refused.

`torch.load` is not used. Even with `weights_only=True` it ran code of the file before torch 2.6
(CVE-2025-32434) and corrupted memory before 2.10 (CVE-2026-24747), and the published base has torch 2.1.

The format (PyTorch since 1.6) is a zip archive of uncompressed members in one folder: `data.pkl` is the
pickled mapping, in which a tensor is a call of `torch._utils._rebuild_tensor_v2` on a storage, and `data/KEY`
holds the storage's numbers. Here the names in the pickle stand for small objects of this module; none is ever
imported.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from yuan2_model.dimensions import Shape
from yuan2_model.errors import ModelFilesError

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {
    "DoubleStorage": ("F64", "float64", 8),
    "FloatStorage": ("F32", "float32", 4),
    "HalfStorage": ("F16", "float16", 2),
    "BFloat16Storage": ("BF16", "bfloat16", 2),
    "LongStorage": ("I64", "int64", 8),
    "IntStorage": ("I32", "int32", 4),
    "ShortStorage": ("I16", "int16", 2),
    "CharStorage": ("I8", "int8", 1),
    "ByteStorage": ("U8", "uint8", 1),
    "BoolStorage": ("BOOL", "bool", 1),
}
"""Storage classes of torch: the type as safetensors calls it, as torch does, and its bytes."""
_LARGEST_PICKLE = 100_000_000
"""Bytes of `data.pkl`: names and shapes only, as many as a safetensors header may have."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip member: magic number, and the lengths of its name and of its extra field (APPNOTE.TXT 4.3.7)."""


@dataclass(frozen=True)
class _Storage:
    """Numbers in the file."""

    kind: str
    """A key of `_TYPES`."""
    member: zipfile.ZipInfo
    count: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * _TYPES[self.kind][2]


@dataclass(frozen=True)
class _Strided:
    """A tensor: some of a storage's numbers."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape

    def __setstate__(self, _state: object) -> NoReturn:
        raise pickle.UnpicklingError("it sets attributes of a tensor")


class _Mapping(OrderedDict[str, Any]):
    """What stands for `collections.OrderedDict`; the attributes of a state dict (`_metadata`) are dropped."""

    def __setstate__(self, _state: object) -> None:
        pass


class _Call:
    """What stands for a function of torch that a pickle may call."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any) -> _Strided:
        if self._name == "_rebuild_parameter":
            return _checked(arguments[0])
        storage, offset, shape, stride = arguments[:4]
        return _checked(_Strided(storage, offset, tuple(shape), tuple(stride)))

    def __setstate__(self, _state: object) -> NoReturn:
        raise pickle.UnpicklingError("it sets attributes of a function")


class _Reader(pickle.Unpickler):
    """Builds strings, numbers, tuples, mappings and tensors' descriptions, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in the pickle."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Mapping
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Call(name)
        if module == "torch" and name in _TYPES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a persistent id describes."""
        mark, kind, key, _location, count = pid
        if mark != "storage" or kind not in _TYPES or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f"it holds a storage that is described as {pid!r}")
        storage = _Storage(kind, self._archive.getinfo(f"{self._folder}/data/{key}"), count)
        if storage.member.file_size < storage.size:
            raise pickle.UnpicklingError(f"storage {key} is shorter than its tensors")
        return storage


def read_bin_header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Shape and type (as safetensors calls it) of each tensor in one file; the numbers stay on disk.

    Raises:
        ModelFilesError: the file is damaged, of another format, or holds more than named tensors.
    """
    return {name: (found.shape, _TYPES[found.storage.kind][0]) for name, found in _read(path).items()}


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped from disk: copy what outlives the file.

    Raises:
        ModelFilesError: as `read_bin_header`.
    """
    import torch

    described = _read(path)
    file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    with path.open("rb") as stream:
        for name, found in described.items():
            _, dtype, width = _TYPES[found.storage.kind]
            start = _data_offset(stream, found.storage.member, path)
            numbers = file[start : start + found.storage.size]
            if start % width:
                numbers = numbers.clone()
            flat = numbers.view(getattr(torch, dtype))
            first = flat.storage_offset() + found.offset
            tensors[name] = flat.as_strided(found.shape, found.stride, first)
    return tensors


def _read(path: Path) -> dict[str, _Strided]:
    try:
        with zipfile.ZipFile(path) as archive:
            document: Any = _Reader(archive, _folder(archive)).load()
    except zipfile.BadZipFile:
        raise ModelFilesError(
            f"{path}: truncated, or not of PyTorch 1.6 or later; copy it again, or convert an older file to "
            f"safetensors where you trust it"
        ) from None
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        cause = str(error).split("\n", 1)[0]
        raise ModelFilesError(
            f"{path}: truncated, or not a file of plain tensors ({cause}); copy it again, or use safetensors"
        ) from None
    if not isinstance(document, dict) or not all(isinstance(value, _Strided) for value in document.values()):
        raise ModelFilesError(f"{path}: must hold a mapping of names to tensors and nothing else")
    return document


def _folder(archive: zipfile.ZipFile) -> str:
    """The folder of an archive, checked to be as PyTorch writes it."""
    pickles = [info.filename for info in archive.infolist() if info.filename.count("/") == 1]
    folders = [name.removesuffix("/data.pkl") for name in pickles if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError("no data.pkl")
    folder = folders[0]
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("its members are compressed")
    if archive.getinfo(f"{folder}/data.pkl").file_size > _LARGEST_PICKLE:
        raise ValueError(f"data.pkl is larger than {_LARGEST_PICKLE} bytes")
    order = f"{folder}/byteorder"
    if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
        raise ValueError("its bytes are in the order of another processor")
    return folder


def _checked(tensor: Any) -> _Strided:
    """A tensor whose numbers all lie in its storage."""
    if not isinstance(tensor, _Strided) or not isinstance(tensor.storage, _Storage):
        raise pickle.UnpicklingError("it rebuilds something that is no tensor")
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if len(tensor.shape) != len(tensor.stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor's shape or stride is impossible")
    steps = zip(tensor.shape, tensor.stride, strict=True)
    last = tensor.offset + sum((size - 1) * step for size, step in steps)
    if 0 not in tensor.shape and last >= tensor.storage.count:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return tensor


def _data_offset(stream: io.BufferedReader, member: zipfile.ZipInfo, path: Path) -> int:
    """Where a member's bytes begin in the file."""
    stream.seek(member.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    magic, name, extra = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    start = int(member.header_offset + _LOCAL_HEADER.size + name + extra)
    if magic != b"PK\x03\x04" or start + member.file_size > path.stat().st_size:
        raise ModelFilesError(f"{path}: truncated or damaged at {member.filename}; copy it again")
    return start
