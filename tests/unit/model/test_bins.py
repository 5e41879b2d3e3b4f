"""`.bin` weights are read as data: the same tensors as `torch.load` gives, and nothing in them is run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from yuan2_model.bins import read_bin, read_bin_header
from yuan2_model.errors import ModelFilesError

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
}


class Call:
    """Pickles as a call of a function, and, with `state`, as setting attributes of what it returns."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self._reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._reduced


def refused(file: Path) -> str:
    with pytest.raises(ModelFilesError) as caught:
        read_bin_header(file)
    with pytest.raises(ModelFilesError):
        read_bin(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rebuilt(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], state: Any = None) -> Call:
    numbers = torch.arange(4.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.float32, _internal=True)
    arguments = (storage, offset, shape, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments, state=state)


@given(
    named=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_are_those_of_torch(named: dict[str, tuple[str, list[int]]], tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    tensors = {name: torch.rand(shape).mul(100).to(DTYPES[kind]) for name, (kind, shape) in named.items()}
    torch.save(tensors, file)
    found, header = read_bin(file), read_bin_header(file)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert header[name] == (tuple(tensor.shape), named[name][0])


def test_views_parameters_and_shared_storage_are_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    whole = torch.arange(24.0).reshape(4, 6)
    tensors: dict[str, Tensor] = {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save(tensors, file)
    found = read_bin(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_state_dict_with_its_metadata_is_read(tmp_path: Path) -> None:
    file, module = tmp_path / "weights.bin", nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    torch.save(module.state_dict(), file)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in read_bin(file).items())


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"x": torch.ones(2)}, file)
    code = (
        "import sys; from pathlib import Path; from yuan2_model.bins import read_bin_header as read; "
        "print(read(Path(sys.argv[1])), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", code, file], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == "{'x': ((2,), 'F32')} False\n"


@pytest.mark.parametrize("layout", ["zip", "legacy", "tar", "plain"])
def test_code_in_a_file_is_not_run(layout: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.bin", tmp_path / "was-run"
    evil = {"x": torch.ones(1), "y": Call(os.mkdir, str(trace))}
    if layout == "zip":
        torch.save(evil, file)
    elif layout == "legacy":
        torch.save(evil, file, _use_new_zipfile_serialization=False)
    elif layout == "plain":
        file.write_bytes(pickle.dumps(evil["y"]))
    else:
        with tarfile.open(file, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                content = pickle.dumps(evil["y"])
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    assert "safetensors" in refused(file)
    assert not trace.exists()
    if layout == "plain":  # what the file would do where it is trusted
        pickle.loads(file.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (Call(eval, "1"), "it asks for"),
        (Call(getattr, "", "upper"), "it asks for"),
        (torch.float32, "it asks for torch.float32"),
        (torch.ones(2).to_sparse(), "it asks for torch._utils._rebuild_sparse_tensor"),
        (rebuilt(1, (4,), (1,)), "a tensor is larger than its storage"),
        (rebuilt(0, (2, 2), (3, 1)), "a tensor is larger than its storage"),
        (rebuilt(-1, (2,), (1,)), "shape or stride is impossible"),
        (rebuilt(0, (2,), (-1,)), "shape or stride is impossible"),
        (rebuilt(0, (2, 2), (1,)), "shape or stride is impossible"),
        (rebuilt(0, (2,), (1,), state={"offset": 99}), "it sets attributes of a tensor"),
        (rebuilt(0, (2,), (1,), state=(None, {"offset": 99})), "it sets attributes of a tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(value: Any, cause: str, tmp_path: Path) -> None:
    torch.save({"x": value}, tmp_path / "weights.bin")
    assert cause in refused(tmp_path / "weights.bin")


def test_a_storage_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    whole, short = tmp_path / "whole.bin", tmp_path / "short.bin"
    torch.save({"x": torch.ones(100)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(short, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            target.writestr(info.filename, content[:8] if "/data/" in info.filename else content)
    assert "storage 0 is shorter than its tensors" in refused(short)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    whole, small = tmp_path / "whole.bin", tmp_path / "small.bin"
    torch.save({"x": torch.ones(100)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert "its members are compressed" in refused(small)


def test_numbers_at_an_odd_place_in_the_file_are_read(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole.bin", tmp_path / "moved.bin"
    torch.save({"x": torch.arange(5.0)}, whole)
    for name in ("a", "ab", "abc", "abcd"):  # of other lengths, so that the numbers begin elsewhere
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(moved, "w") as target:
            for info in source.infolist():
                target.writestr(f"{name}/{info.filename.partition('/')[2]}", source.read(info))
        assert torch.equal(read_bin(moved)["x"], torch.arange(5.0))
