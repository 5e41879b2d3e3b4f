"""Runs that several tests look at: each is trained once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
def wide_inputs(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with a model whose rows hold whole blocks of 4-bit weights: what QLoRA trains."""
    return write_model(tmp_path_factory.mktemp("wide") / "model", hidden=64), inputs[1]


@pytest.fixture(scope="session")
def trained(
    inputs: tuple[Path, Path], wide_inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Train with the given changes to the job and return its output directory; equal requests train once."""
    runs: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in runs:
            root = tmp_path_factory.mktemp("run")
            own = wide_inputs if "qlora" in changes.get("method", {}) else inputs
            train(make_job(*own, root / "output", **{**BASE, **changes}), root / "workspace")
            runs[key] = root / "output"
        return runs[key]

    return run


BASE = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 8, "stage": 2}
"""49 sequences in steps of eight: the seventh holds the last one, the eighth begins the second epoch."""
