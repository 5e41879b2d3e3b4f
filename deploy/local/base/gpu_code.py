"""Take the machine code of GPUs out of shared libraries that a CPU process must load but never runs on a GPU.

torch from PyPI links against CUDA's libraries, and most of their bytes are kernels for GPUs, in sections
that the CPU side only hands to the driver. Here such a section stays in the address space, reads as
zeros, and takes no room in the file. Everything a CPU executes or reads is byte for byte the same.

In the ELF format (64-bit, little-endian; elf(5)): the segment that holds the section is cut in two around
the whole pages of the section. The first part keeps the addresses of the hole by a memory size larger
than its file size, as .bss does; the second part follows at its old address. The extra program header
takes the place of PT_NOTE, which holds the build id, and the table of sections, which no loader reads,
goes.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import BinaryIO

GPU_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
_PT_LOAD, _PT_NOTE = 1, 4
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
# Positions of the header's fields that are used here.
_PHOFF, _SHOFF, _PHNUM, _SHNUM, _SHSTRNDX = 5, 6, 10, 12, 13
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SHT_NOBITS = 8
_SMALLEST_HOLE = 1 << 20
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Segment:
    """A program header."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    file_size: int
    memory_size: int
    align: int


@dataclass(frozen=True)
class Hole:
    """Bytes [start, end) of the file, whole pages of one section."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes saved."""
        return self.end - self.start


def largest_hole(segments: Collection[Segment], sections: Collection[tuple[int, int]]) -> Hole | None:
    """The largest run of whole pages of a section (offset, size) inside one loadable segment."""
    holes = []
    for offset, size in sections:
        for segment in segments:
            inside = segment.offset <= offset and offset + size <= segment.offset + segment.file_size
            if segment.kind == _PT_LOAD and inside:
                page = segment.align
                holes.append(Hole(-(-offset // page) * page, (offset + size) // page * page))
    return max((hole for hole in holes if hole.size > 0), key=lambda hole: hole.size, default=None)


def cut(segments: Collection[Segment], hole: Hole) -> list[Segment]:
    """Program headers of the file without the hole. ValueError when there is no PT_NOTE to give up."""
    spare = next((segment for segment in segments if segment.kind == _PT_NOTE), None)
    if spare is None:
        raise ValueError("no PT_NOTE")
    result = []
    for segment in segments:
        if segment is spare:
            continue
        end = segment.offset + segment.file_size
        if segment.kind == _PT_LOAD and segment.offset <= hole.start and hole.end <= end:
            result += _halves(segment, hole)
        elif segment.offset >= hole.end:
            result.append(replace(segment, offset=segment.offset - hole.size))
        else:
            result.append(segment)
    return result


def _halves(segment: Segment, hole: Hole) -> list[Segment]:
    before, upto = hole.start - segment.offset, hole.end - segment.offset
    first = replace(segment, file_size=before, memory_size=upto)
    second = replace(
        segment,
        offset=hole.start,
        address=segment.address + upto,
        physical=segment.physical + upto,
        file_size=segment.file_size - upto,
        memory_size=segment.memory_size - upto,
    )
    return [first, second]


def drop_section(path: Path, names: Collection[str] = GPU_SECTIONS, smallest: int = _SMALLEST_HOLE) -> int:
    """Rewrite a library without the largest of the named sections; returns the bytes saved."""
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
        if len(start) < _HEADER.size or not start.startswith(_ELF64_LITTLE):
            return 0
        header = list(_HEADER.unpack(start))
        segments = _segments(file, header)
        hole = largest_hole(segments, _named_sections(file, header, names))
    if hole is None or hole.size < smallest or not any(segment.kind == _PT_NOTE for segment in segments):
        return 0
    table = b"".join(_SEGMENT.pack(*astuple(segment)) for segment in cut(segments, hole))
    header[_SHOFF] = header[_SHNUM] = header[_SHSTRNDX] = 0
    _rewrite(path, hole, _HEADER.pack(*header), header[_PHOFF], table)
    return hole.size


def _segments(file: BinaryIO, header: list[int]) -> list[Segment]:
    file.seek(header[_PHOFF])
    table = file.read(header[_PHNUM] * _SEGMENT.size)
    return [Segment(*fields) for fields in _SEGMENT.iter_unpack(table)]


def _named_sections(file: BinaryIO, header: list[int], names: Collection[str]) -> list[tuple[int, int]]:
    """(offset, size) of the sections called one of `names` that have bytes in the file."""
    file.seek(header[_SHOFF])
    sections = list(_SECTION.iter_unpack(file.read(header[_SHNUM] * _SECTION.size)))
    if not sections:
        return []
    strings_offset, strings_size = sections[header[_SHSTRNDX]][4:6]
    file.seek(strings_offset)
    strings = file.read(strings_size)

    def name_of(start: int) -> str:
        return strings[start : strings.index(b"\0", start)].decode()

    return [(s[4], s[5]) for s in sections if s[1] != _SHT_NOBITS and name_of(s[0]) in names]


def _rewrite(path: Path, hole: Hole, header: bytes, table_offset: int, table: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as source, partial.open("wb") as target:
        _copy(source, target, hole.start)
        source.seek(hole.end)
        shutil.copyfileobj(source, target, _COPY_BYTES)
        target.seek(0)
        target.write(header)
        target.seek(table_offset)
        target.write(table)
    shutil.copymode(path, partial)
    partial.replace(path)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        block = source.read(min(size, _COPY_BYTES))
        target.write(block)
        size -= len(block)
