"""A library without one of its sections still loads and computes, and is smaller by that section."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from yuan2_local.paths import LOCAL


@pytest.fixture(scope="module")
def gpu_code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_code", LOCAL / "base" / "gpu_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_code"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of this process' C mathematics library."""
    name = ctypes.util.find_library("m")
    assert name is not None
    ctypes.CDLL(name)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if name in line}
    copy = tmp_path / "libcopy.so"
    shutil.copy2(mapped.pop(), copy)
    return copy


def test_a_library_without_a_section_loads_computes_and_is_smaller(
    gpu_code: ModuleType, library: Path
) -> None:
    before = library.stat()
    saved = gpu_code.drop_section(library, names=(".eh_frame",), smallest=1)
    assert saved > 0
    assert library.stat().st_size == before.st_size - saved
    assert library.stat().st_mode == before.st_mode
    loaded = ctypes.CDLL(str(library))
    loaded.cos.restype, loaded.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    assert loaded.cos(0.0) == 1.0


def test_a_library_without_gpu_code_and_a_file_that_is_none_stay_as_they_are(
    gpu_code: ModuleType, library: Path, tmp_path: Path
) -> None:
    before = library.read_bytes()
    assert gpu_code.drop_section(library) == 0
    assert library.read_bytes() == before
    text = tmp_path / "linker-script.so"
    text.write_text("INPUT(libc.so.6)")
    assert gpu_code.drop_section(text) == 0


def test_the_cut_keeps_every_address_and_moves_what_follows(gpu_code: ModuleType) -> None:
    load, note = gpu_code._PT_LOAD, gpu_code._PT_NOTE
    page = 0x1000
    code = gpu_code.Segment(load, 5, 0x1000, 0x11000, 0x11000, 0x9000, 0x9000, page)
    data = gpu_code.Segment(load, 6, 0xA100, 0x1B100, 0x1B100, 0x500, 0x900, page)
    build_id = gpu_code.Segment(note, 4, 0x200, 0x200, 0x200, 0x24, 0x24, 4)
    hole = gpu_code.largest_hole([code, data], [(0x2123, 0x4000), (0x8000, 0x10)])
    assert (hole.start, hole.end) == (0x3000, 0x6000)
    first, second, moved = gpu_code.cut([build_id, code, data], hole)
    assert (first.address, first.file_size, first.memory_size) == (0x11000, 0x2000, 0x5000)
    assert (second.offset, second.address, second.file_size) == (0x3000, 0x16000, 0x4000)
    assert second.address + second.memory_size == code.address + code.memory_size
    assert moved == gpu_code.replace(data, offset=0x7100)
    for segment in (first, second, moved):
        assert (segment.address - segment.offset) % page == 0


def test_a_section_smaller_than_a_page_is_no_hole(gpu_code: ModuleType) -> None:
    segment = gpu_code.Segment(gpu_code._PT_LOAD, 4, 0, 0, 0, 0x9000, 0x9000, 0x1000)
    assert gpu_code.largest_hole([segment], [(0x1100, 0xE00)]) is None
