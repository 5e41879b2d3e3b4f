"""Every parameter has the type that its job asks for, or the job ends with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import make_job, write_model
from yuan2_core.contract import TrainJob
from yuan2_trainer.model.loading import load_for_training
from yuan2_trainer.model.precision import check_model, check_state
from yuan2_trainer.pod.outcome import JobError

LORA: dict[str, Any] = {"method": {"lora": {}}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def job(directory: Path, **changes: Any) -> TrainJob:
    return make_job(directory, Path("/d"), Path("/o"), stage=0, **changes)


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_single_parameter_of_another_type_is_named(
    directory: Path, method: dict[str, Any], precision: str
) -> None:
    asked = job(directory, precision=precision, **method)
    model = load_for_training(asked)
    check_model(model, asked)
    model.model.norm.to(torch.float16)
    with pytest.raises(JobError, match=r"precision: model.norm.weight is float16 instead of b?float\d+; set"):
        check_model(model, asked)


def test_an_adapter_that_peft_left_in_fp32_is_named(directory: Path) -> None:
    asked = job(directory, precision="bf16", **LORA)
    model = load_for_training(asked)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with pytest.raises(
        JobError, match=r"lora_A\S+ is float32 instead of bfloat16 and 7 others are wrong too"
    ):
        check_model(model, asked)


def test_what_is_exported_has_the_precision_of_the_run(directory: Path) -> None:
    asked = job(directory, precision="bf16")
    state = {"one": torch.zeros(1, dtype=torch.bfloat16), "other": torch.zeros(1)}
    with pytest.raises(JobError, match=r"other is float32 instead of bfloat16; set deepspeed.stage"):
        check_state(state, asked)
    check_state({"one": state["one"]}, asked)
