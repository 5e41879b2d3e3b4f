"""Runs that several tests look at: each is trained once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import train
from tests.support.training import make_job, write_data, write_model

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory, and 25 conversations that make 49 sequences: no multiple of any batch."""
    root = tmp_path_factory.mktemp("inputs")
    return write_model(root / "model"), write_data(root / "data.json", 25)


@pytest.fixture(scope="session")
def trained(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train with the given changes to the job and return its output directory; equal requests train once."""
    runs: dict[str, Path] = {}

    def run(**changes: object) -> Path:
        key = repr(sorted(changes.items()))
        if key not in runs:
            root = tmp_path_factory.mktemp("run")
            train(make_job(*inputs, root / "output", **{**BASE, **changes}), root / "workspace")
            runs[key] = root / "output"
        return runs[key]

    return run


BASE = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 8, "stage": 2}
"""49 sequences in steps of eight: the seventh holds the last one, the eighth begins the second epoch."""
