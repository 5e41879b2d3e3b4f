"""Parameters have the type that was asked for, whatever the processor and DeepSpeed make of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.trainer.conftest import BASE
from tests.support import processors
from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job
from yuan2_core.contract import TrainJob

Train = Callable[..., Path]
LORA: dict[str, Any] = {"method": {"lora": {"dropout": 0.0}}}
QLORA: dict[str, Any] = {"method": {"qlora": {"dropout": 0.0}}}


def job_of(inputs: tuple[Path, Path], root: Path, **changes: Any) -> TrainJob:
    return make_job(*inputs, root / "output", **{**BASE, **changes})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("*/*.safetensors")))


FP32 = [(known, stage, {}) for known in ("fp16,bf16", "bf16", "none") for stage in (0, 2, 3)]


@pytest.mark.parametrize(("known", "stage", "method"), [*FP32, ("bf16", 3, LORA)])
def test_fp32_is_fp32_whatever_types_the_processor_knows(
    trained: Train,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: str,
    stage: int,
    method: dict[str, Any],
) -> None:
    monkeypatch.setenv(processors.VARIABLE, known)
    train(job_of(inputs, tmp_path, stage=stage, **method), tmp_path / "workspace")
    plain = trained(stage=stage, **method)
    assert losses(tmp_path / "output") == losses(plain)
    expected = weights(plain)
    for name, tensor in weights(tmp_path / "output").items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("known", "stage"), [("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16,bf16", 3)])
def test_bf16_is_bf16_whether_the_processor_knows_fp16_or_not(
    trained: Train,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: str,
    stage: int,
) -> None:
    monkeypatch.setenv(processors.VARIABLE, known)
    train(job_of(inputs, tmp_path, stage=stage, precision="bf16"), tmp_path / "workspace")
    assert losses(tmp_path / "output") == losses(trained(stage=stage, precision="bf16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "output").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "way_out"), [({}, "set it to fp32, or use GPUs that can"), (QLORA, "use GPUs that can")]
)
def test_bf16_where_the_device_does_not_know_it_is_an_invalid_job(
    wide_inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    way_out: str,
) -> None:
    monkeypatch.setenv(processors.VARIABLE, "none")
    outcome = run_ranks(job_of(wide_inputs, tmp_path, precision="bf16", **method), tmp_path / "workspace")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    assert outcome.message == f"training.precision: this cpu device cannot compute in bf16; {way_out}"


@pytest.mark.parametrize(
    ("place", "stage", "found"),
    [
        (
            "zero.Init",
            3,
            r"model\.embed_tokens\.weight is bfloat16 instead of float32 and \d+ others are wrong too",
        ),
        ("initialize", 2, r"model\.norm\.weight is bfloat16 instead of float32"),
        ("initialize", 0, r"model\.norm\.weight is bfloat16 instead of float32"),
    ],
)
def test_a_parameter_of_another_type_ends_the_run_before_its_first_step(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    stage: int,
    found: str,
) -> None:
    monkeypatch.setenv(processors.CARELESS, place)
    job = job_of(inputs, tmp_path, stage=stage)
    outcome = run_ranks(job, tmp_path / "workspace", module="tests.support.careless_rank")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    sentence = rf"training\.precision: {found}; set deepspeed\.stage to another stage"
    assert re.match(sentence, outcome.message)
    assert not (tmp_path / "output" / "metrics.jsonl").exists()
