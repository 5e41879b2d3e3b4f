"""Storage serves a run's weights once, however many ranks it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.trainer.test_resume import cut_back
from tests.support.ranks import run_ranks
from tests.support.readings import readings
from tests.support.training import losses, make_job
from yuan2_model import check_model_directory
from yuan2_model.dimensions import EMBEDDING, HEAD
from yuan2_trainer.checkpoint.manifest import Manifest

MODULE = "tests.support.reading_rank"
STEPS: dict[str, Any] = {
    "processes": 2,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "every_steps": 1,
}
QLORA: dict[str, Any] = {"stage": 2, "method": {"qlora": {}}, "precision": "bf16"}
RUNS = [
    pytest.param({"stage": 0}, id="stage 0"),
    pytest.param({"stage": 2}, id="stage 2"),
    pytest.param({"stage": 3}, id="stage 3"),
    pytest.param(QLORA, id="qlora"),
]


def run(model: tuple[Path, Path], output: Path, workspace: Path, changes: dict[str, Any]) -> None:
    job = make_job(*model, output, **{**STEPS, **changes})
    for outcome in run_ranks(job, workspace, module=MODULE):
        assert outcome.exit_code == 0, outcome


@pytest.mark.parametrize("changes", RUNS)
def test_one_rank_reads_the_weights_for_all(
    wide_inputs: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The base model, and then the weights of the checkpoint that a run goes on from."""
    run(wide_inputs, tmp_path / "output", tmp_path / "first", changes)
    facts = check_model_directory(wide_inputs[0])
    compared = [EMBEDDING] if HEAD in facts.tensors else []
    read = readings(tmp_path / "first", 0)
    assert sorted(name for name, _ in read) == sorted([*facts.tensors, *compared])
    assert sum(size for _, size in read) == facts.size + sum(facts.tensors[name].size for name in compared)
    assert readings(tmp_path / "first", 1) == []

    output = cut_back(tmp_path / "output", 1, tmp_path / "again")
    run(wide_inputs, output, tmp_path / "second", changes)
    own = fragments_of(next((output / "checkpoints").glob("step-*1")), rank=1)
    # What the optimizer holds of a parameter: the rank's own part of it without ZeRO-0, else all.
    others = dict.fromkeys(own, 0)
    for name, size in readings(tmp_path / "second", 1):
        others[name.partition("#")[0]] += size
    for name, numbers in own.items():
        whole = numbers if changes["stage"] else whole_numel(output, name)
        assert others[name] == 3 * 4 * whole, name
    assert losses(output) == pytest.approx(losses(tmp_path / "output"), abs=1e-5)


def manifest_of(directory: Path) -> Manifest:
    return Manifest.model_validate_json((directory / "manifest.json").read_text())


def fragments_of(directory: Path, rank: int) -> dict[str, int]:
    """Parameters that a rank wrote numbers of, and how many."""
    files = manifest_of(directory).files
    name = next(name for name in files if name.startswith(f"shard-{rank:05d}"))
    return {key: numel for key, (_, numel) in files[name].fragments.items()}


def whole_numel(output: Path, name: str) -> int:
    shape = manifest_of(next((output / "checkpoints").glob("step-*1"))).shapes[name]
    return torch.Size(shape).numel()
