"""50 steps on fixed data and seed follow the stored losses: what was trained yesterday is trained today.

`YUAN2_WRITE_CURVES=1` writes the curves anew; the change of each number then stands in the commit. Products
of bf16 differ in their last bit from one kind of processor to another, which 50 steps enlarge: QLoRA's curve
names the kind it is from, and another kind follows it less closely.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import losses
from yuan2_trainer.model.methods import missing_package

Train = Callable[..., Path]
CURVES = Path(__file__).resolve().parents[2] / "golden" / "curves"
SHAPE: dict[str, Any] = {
    "max_steps": 50,
    "micro_batch_size": 8,
    "warmup_ratio": 0.1,
    "packing": False,
    "stage": 0,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 3e-3},
    "lora": {"learning_rate": 1e-2, "method": {"lora": {"dropout": 0.0, "target_modules": ALL}}},
    "qlora": {
        "learning_rate": 1e-2,
        "method": {"qlora": {"dropout": 0.0, "target_modules": ALL}},
        "precision": "bf16",
    },
}


def arithmetic() -> str:
    """What bf16 is multiplied with here."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    found = sorted(flags & {"avx512_bf16", "amx_bf16", "avx10", "sve", "bf16"})
    return " ".join([torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability(), *found])


def tolerance(name: str) -> float:
    """How far from the stored curve a loss may be here."""
    recorded = CURVES / f"{name}.arithmetic"
    return 1e-4 if not recorded.exists() or recorded.read_text().strip() == arithmetic() else 0.05


@pytest.mark.parametrize("name", METHODS)
def test_the_stored_curve_is_followed(trained: Train, name: str) -> None:
    if name == "qlora" and missing_package("bitsandbytes", (0, 46)):
        pytest.skip("bitsandbytes is not installed here")
    found = losses(trained(**SHAPE, **METHODS[name]))
    path = CURVES / f"{name}.json"
    if os.environ.get("YUAN2_WRITE_CURVES"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([round(value, 6) for value in found]) + "\n")
        if METHODS[name].get("precision") == "bf16":
            path.with_suffix(".arithmetic").write_text(arithmetic() + "\n")
    expected = json.loads(path.read_text())
    assert len(found) == 50
    assert found[-1] < found[0] - 0.2
    assert found == pytest.approx(expected, abs=tolerance(name))


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_follows_the_curve(trained: Train, name: str, stage: int) -> None:
    found = losses(trained(**{**SHAPE, "stage": stage}, **METHODS[name]))
    assert found == pytest.approx(json.loads((CURVES / f"{name}.json").read_text()), abs=1e-4)
