"""LoRA, QLoRA, offload, overrides on real ranks: equal curves in all stages, exact resume, right exports."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks, train
from tests.support.training import losses, make_job, metrics
from yuan2_core.sections import LoRA

Train = Callable[..., Path]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {
    "method": {"lora": {"target_modules": ALL}},
    "merge_adapter": True,
    "learning_rate": 1e-2,
    "every_steps": 4,
}
QLORA: dict[str, Any] = {**LORA, "method": {"qlora": {"target_modules": ALL}}, "precision": "bf16"}
DORA: dict[str, Any] = {**LORA, "method": {"lora": {"dora": True, "rs_lora": True}}}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_lora_is_the_same_in_every_stage(trained: Train, stage: int, processes: int) -> None:
    """Dropout differs between ranks, so the number of ranks is the same on both sides."""
    shape = {"processes": processes, "micro_batch_size": 4}
    one, other = trained(**LORA, **shape, stage=stage), trained(**LORA, **shape, stage=2)
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert losses(other)[-1] < losses(other)[0] - 0.1
    expected = weights(other)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("method", "stage"),
    [(LORA, 0), (LORA, 2), (LORA, 3), (DORA, 2), (QLORA, 2)],
)
def test_an_adapter_run_resumes_exactly(
    trained: Train,
    inputs: tuple[Path, Path],
    wide_inputs: tuple[Path, Path],
    tmp_path: Path,
    method: dict[str, Any],
    stage: int,
) -> None:
    own = wide_inputs if method is QLORA else inputs
    unbroken = trained(**method, stage=stage)
    output = tmp_path / "output"
    shutil.copytree(unbroken, output)
    for made in ("adapter", "model", "checkpoints/step-000008"):
        shutil.rmtree(output / made, ignore_errors=True)
    (output / "job.json").unlink()
    base = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 8}
    train(make_job(*own, output, **{**base, **method, "stage": stage}), tmp_path / "workspace")
    assert "going on from step-000004" in (tmp_path / "workspace" / "rank-0.log").read_text()
    assert losses(output) == losses(unbroken)
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


def test_checkpoints_hold_what_is_trained_and_nothing_else(trained: Train) -> None:
    manifest = json.loads((trained(**LORA) / "checkpoints" / "step-000004" / "manifest.json").read_text())
    assert len(manifest["shapes"]) == 2 * len(ALL) * 2
    assert all(".lora_" in name for name in manifest["shapes"])


@pytest.mark.parametrize(
    "changes",
    [{**LORA, "stage": 2}, {**LORA, "stage": 3}, DORA, QLORA],
    ids=["lora", "zero-3", "dora", "qlora"],
)
def test_the_merged_model_is_base_and_adapter(
    trained: Train, inputs: tuple[Path, Path], wide_inputs: tuple[Path, Path], changes: dict[str, Any]
) -> None:
    """Loaded by plain PEFT over the published class; for QLoRA over the weights that its 4 bits stand for."""
    directory = (wide_inputs if changes is QLORA else inputs)[0]
    from peft import PeftModel

    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import Yuan2ForCausalLM

    output = trained(**changes)
    base = Yuan2ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if "qlora" in changes["method"]:
        _as_its_4_bits(base, directory)
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    assert adapted.peft_config["default"].base_model_name_or_path == str(directory)
    merged = Yuan2ForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    ids = torch.arange(3, 35).view(2, 16)
    in_bf16 = "qlora" in changes["method"]
    if not in_bf16:
        with torch.no_grad():
            one, other = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    summed = dict(adapted.merge_and_unload().named_parameters())
    for name, tensor in merged.named_parameters():
        # Summed in fp32; QLoRA's sum is then rounded to bf16, by up to half a unit in the last place.
        bound = {"atol": 1e-6, "rtol": 2**-8} if in_bf16 else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(tensor, summed[name], **bound, msg=name)
    for made in ("adapter", "model"):
        assert Yuan2Tokenizer.from_pretrained(output / made).sep_id > 0
        assert (output / made / "config.json").is_file()


def _as_its_4_bits(model: Any, directory: Path) -> None:
    from yuan2_trainer.model.quantised import dequantised, load_quantised

    quantised = dict(load_quantised(directory, torch.device("cpu")).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dequantised(quantised[name], parameter.shape).float())


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_offload_changes_nothing(trained: Train, stage: int, offload: str) -> None:
    moved = trained(stage=stage, deepspeed={"offload": offload})
    assert losses(moved) == pytest.approx(losses(trained()), abs=1e-5)


def test_offloaded_parameters_train_an_adapter(trained: Train) -> None:
    moved = trained(**LORA, stage=3, deepspeed={"offload": "parameters"})
    assert losses(moved) == pytest.approx(losses(trained(**LORA)), abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_every_second_layer_changes_nothing(trained: Train, stage: int) -> None:
    every_second = trained(stage=stage, gradient_checkpointing_every=2)
    assert losses(every_second) == pytest.approx(losses(trained()), abs=1e-5)


def test_overrides_and_the_profiler_reach_deepspeed(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = {"flops_profiler": True, "overrides": {"wall_clock_breakdown": True, "steps_per_print": 1}}
    job = make_job(*inputs, tmp_path / "output", max_steps=3, deepspeed=wanted)
    train(job, tmp_path / "workspace")
    log = (tmp_path / "workspace" / "rank-0.log").read_text()
    assert "DeepSpeed Flops Profiler" in log
    assert "Profile Summary at step 2" in log
    # The time of the whole pass, not one since 1970; a convolution is a product like any other.
    latency = re.search(r"fwd latency - \{'Yuan2ForCausalLM': '[\d.]+ (\w+)'\}", log)
    assert latency is not None
    assert latency[1] in ("ms", "s")
    convolution = re.search(r"conv1\): PairConvolution\(([\d.]+) K = .*? ([\d.]+) KMACs", log)
    product = re.search(r"q_proj\): Linear\(([\d.]+) K = .*? ([\d.]+) KMACs", log)
    assert convolution is not None
    assert product is not None
    assert convolution[2] == product[2]


def test_an_unknown_zero_key_is_an_invalid_job(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = {"overrides": {"zero_optimization": {"no_such_key": 1}}}
    outcome = run_ranks(make_job(*inputs, tmp_path / "o", deepspeed=wanted), tmp_path / "workspace")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    assert "no_such_key" in outcome.message


def test_a_finished_adapter_is_not_trained_again(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(trained(**LORA), output)
    before = metrics(output)
    base = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 8}
    outcome = run_ranks(make_job(*inputs, output, **base, **LORA), tmp_path / "workspace")[0]
    assert "already: 8 steps" in outcome.message
    assert metrics(output) == before


def test_a_worker_answers_with_an_adapter_as_with_the_merged_model(
    trained: Train, inputs: tuple[Path, Path]
) -> None:
    from yuan2_server.engines.builtin.runner import load

    output = trained(**LORA)
    served = load(str(inputs[0]), "cpu", "fp32", str(output / "adapter"))
    merged = load(str(output / "model"), "cpu", "fp32")
    ids = torch.arange(3, 19).view(1, 16)
    torch.testing.assert_close(
        served(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4
    )
    answers = [model.generate(ids, max_new_tokens=12, do_sample=False).tolist() for model in (served, merged)]
    assert answers[0] == answers[1]


def test_the_defaults_are_the_recipes() -> None:
    assert LoRA().target_modules == ("q_proj", "v_proj")
