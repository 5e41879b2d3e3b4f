"""Which weights a model directory holds, without reading all of them. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from os import PathLike
from pathlib import Path

from yuan2_model.files import find_shards, read_config

PIECE = 1 << 20
"""Bytes at the head and at the tail of each weight file that are read."""


def model_fingerprint(directory: str | PathLike[str]) -> str:
    """SHA-256 over config.json, the tensor index, and each weight file's size, head and tail.

    It depends neither on where the directory lies nor on a JSON file's white space. The head of a safetensors
    file holds names, shapes and types of all its tensors, the tail of a `.bin` file their checksums; training
    changes every tensor, so that head and tail tell two sets of weights apart in megabytes.

    Raises:
        ModelFilesError: config.json or the weights are missing.
        OSError: a file cannot be read.
    """
    root = Path(directory)
    shards, index = find_shards(root)
    facts = json.dumps([read_config(root), index], sort_keys=True)
    digest = hashlib.sha256(facts.encode())
    for shard in shards:
        digest.update(_piece_digest(root / shard))
    return digest.hexdigest()


def _piece_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(stream.read(PIECE))
        stream.seek(max(0, size - PIECE))
        digest.update(stream.read(PIECE))
    return digest.digest()
