"""50 steps in fp32 on fixed data and seed follow stored losses: what was trained yesterday is trained today.

`YUAN2_WRITE_CURVES=1` writes the curves anew; the change of each number then stands in the commit. Only fp32
has a curve: in bf16 it would be the processor's (see `test_qlora` for what takes its place).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import losses

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
}

TOLERANCE = 1e-4


@pytest.mark.numbers
@pytest.mark.parametrize("name", METHODS)
def test_the_stored_curve_is_followed(trained: Train, name: str) -> None:
    found = losses(trained(**SHAPE, **METHODS[name]))
    path = CURVES / f"{name}.json"
    if os.environ.get("YUAN2_WRITE_CURVES"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([round(value, 6) for value in found]) + "\n")
    expected = json.loads(path.read_text())
    assert len(found) == 50
    assert found[-1] < found[0] - 0.2
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_follows_the_curve(trained: Train, name: str, stage: int) -> None:
    found = losses(trained(**{**SHAPE, "stage": stage}, **METHODS[name]))
    assert found == pytest.approx(json.loads((CURVES / f"{name}.json").read_text()), abs=TOLERANCE)
