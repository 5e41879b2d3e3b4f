"""The bytes that the estimate gives each phase of a run, against those of a small model of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.support.readings import readings
from tests.support.training import make_job, write_model
from yuan2_core.estimate import Run, Shape
from yuan2_core.estimate.memory import weight_bytes
from yuan2_core.estimate.phases import Storage, phases
from yuan2_model import check_model_directory

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA: dict[str, Any] = {
    "method": {"lora": {"r": 16, "target_modules": list(TARGETS)}},
    "merge_adapter": True,
    "processes": 2,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "every_steps": 1,
}
NEAR = 0.03
"""The estimate counts matrices; norms, biases and the headers of files come on top: of 1% here, less in large
models."""


@pytest.mark.parametrize("stage", [2, 3])
def test_each_phase_reads_and_writes_what_the_estimate_says(
    inputs: tuple[Path, Path], tmp_path: Path, stage: int
) -> None:
    model = write_model(tmp_path / "model", layers=3, hidden=128)
    output, workspace = tmp_path / "output", tmp_path / "workspace"
    job = make_job(model, inputs[1], output, stage=stage, **LORA)
    for outcome in run_ranks(job, workspace, module="tests.support.reading_rank"):
        assert outcome.exit_code == 0, outcome
    run = Run(
        shape=Shape.of(check_model_directory(model).dimensions),
        method="lora",
        stage=stage,  # type: ignore[arg-type]
        length=128,
        micro_batch=4,
        accumulation=1,
        gpus_per_node=2,
        lora_rank=16,
        lora_targets=TARGETS,
        value_bytes=4,
    )
    load, _, checkpoint, export = phases(run, Storage("disk", 1e9, 1e9), merge=True)
    read = sum(size for rank in (0, 1) for _, size in readings(workspace, rank))
    assert read == pytest.approx(load.read, rel=NEAR)
    held = [int((workspace / f"held-{rank}.txt").read_text()) for rank in (0, 1)]
    assert held == pytest.approx([weight_bytes(run)] * 2, rel=NEAR)
    assert size_of(output / "checkpoints" / "step-000001") == pytest.approx(checkpoint.written, rel=NEAR)
    exported = size_of(output / "adapter") + size_of(output / "model")
    assert exported == pytest.approx(export.written, rel=NEAR)


def size_of(directory: Path) -> int:
    """Bytes of its tensors' files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
