"""What contradicts itself in a job is named by field, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_job
from yuan2_core.conflicts import DECIDED, job_conflicts, method_name
from yuan2_core.contract import TrainJob
from yuan2_core.sections import Evaluation, Method


def job(**changes: Any) -> TrainJob:
    held_out = changes.pop("held_out", {})
    made = make_job(Path("/m"), Path("/d"), Path("/o"), **changes)
    return made.model_copy(update={"dataset": made.dataset.model_copy(update=held_out)})


def only(found: TrainJob) -> str:
    [text] = job_conflicts(found)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {}}, "method: set exactly one of full, lora and qlora"),
        ({"method": {"full": {}, "lora": {}}}, "method: set exactly one"),
        ({"merge_adapter": True}, "output.mergeAdapter: method.full trains no adapter"),
        ({"method": {"qlora": {}}, "precision": "bf16", "stage": 3}, "ZeRO-3 cannot cut 4-bit weights"),
        ({"method": {"qlora": {}}, "precision": "fp32"}, "method.qlora computes in bf16"),
        ({"method": {"lora": {"dora": True}}, "stage": 3}, "set deepspeed.stage to 2, or dora to false"),
        ({"epochs": 1.0, "max_steps": 3}, "training.epochs and training.maxSteps exclude each other"),
        ({"warmup_steps": 7, "warmup_ratio": 0.1}, "warmupRatio and warmupSteps exclude each other"),
        ({"objective": {"dpo": {}, "kto": {}}}, "objective: set at most one of sft, dpo, orpo and kto"),
        ({"files": [{"path": "a"}], "format": "alpaca"}, "each of them has its own format"),
        ({"schedule": "wsd", "decay_ratio": 0.1, "decay_steps": 3}, "decayRatio and decaySteps exclude"),
        ({"decay_steps": 3}, "set schedule to wsd"),
        ({"schedule": "constant", "min_learning_rate": 1e-6}, "with schedule constant the rate never falls"),
        ({"min_learning_rate": 1.0}, "minLearningRate is above training.learningRate"),
        ({"label_smoothing": 0.1, "objective": {"orpo": {}}}, "set objective.dpo.labelSmoothing"),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_every": 2},
            "gradientCheckpointing is false",
        ),
        ({"fp32_gradients": True, "precision": "bf16", "stage": 0}, "set deepspeed.stage to 2, or training."),
        ({"deepspeed": {"offload": "parameters"}}, "only with ZeRO-3, which 51B and 102B have by default"),
        ({"deepspeed": {"offload": "optimizer"}, "stage": 0}, "without ZeRO there is no optimizer state"),
        ({"held_out": {"eval_path": "/e", "eval_fraction": 0.1}}, "evalFraction and evalSource exclude"),
        ({"evaluation": Evaluation(early_stopping_patience=3)}, "set dataset.evalFraction or dataset.evalSo"),
        ({"evaluation": Evaluation(every_steps=3)}, "set dataset.evalFraction or dataset.evalSource"),
        ({"evaluation": Evaluation(sample_answers=3)}, "set dataset.evalFraction or dataset.evalSource"),
    ],
)
def test_a_contradiction_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    assert words in only(job(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"qlora": {}}, "precision": "bf16", "merge_adapter": True},
        {"method": {"lora": {"dora": True}}, "deepspeed": {"offload": "optimizer"}},
        {"stage": 3, "deepspeed": {"offload": "parameters"}},
        {"warmup_steps": 0},
        {"schedule": "wsd", "decay_steps": 3, "min_learning_rate": 1e-6, "label_smoothing": 0.1},
        {"objective": {"kto": {}}, "neftune_alpha": 5.0},
        {"held_out": {"eval_path": "/e"}, "evaluation": Evaluation(every_steps=5)},
        {"held_out": {"eval_fraction": 0.1}, "evaluation": Evaluation(early_stopping_patience=2)},
        {"deepspeed": {"overrides": {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5}}},
        {"deepspeed": {"flops_profiler": True, "overrides": {"flops_profiler": {"profile_step": 3}}}},
    ],
)
def test_what_works_together_is_left_alone(changes: dict[str, Any]) -> None:
    assert list(job_conflicts(job(**changes))) == []


@pytest.mark.parametrize("path", sorted(DECIDED))
def test_a_key_that_a_field_decides_is_refused_by_both_names(path: str) -> None:
    tree: Any = 1
    for key in reversed(path.split(".")):
        tree = {key: tree}
    text = only(job(deepspeed={"overrides": tree}))
    assert text == f"deepspeed.overrides: {path} is decided by {DECIDED[path]}; set that instead"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"bf16": {"enabled": False}}, "bf16.enabled is decided by training.precision"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning has no effect"),
        ({"flops_profiler": {"profile_step": 3}}, "needs deepspeed.flopsProfiler"),
        ({"zero_optimization": {"offload_optimizer": {"fast_init": True}}}, "needs deepspeed.offload"),
        ({"zero_optimization": {"offload_param": {"buffer_count": 3}}}, "deepspeed.offload: parameters"),
    ],
)
def test_overrides_without_effect_are_refused(overrides: dict[str, Any], words: str) -> None:
    assert words in only(job(deepspeed={"overrides": overrides}))


def test_a_method_has_a_name() -> None:
    assert [method_name(Method.model_validate({name: {}})) for name in ("full", "lora", "qlora")] == [
        "full",
        "lora",
        "qlora",
    ]
    assert method_name(Method()) is None
    assert method_name(Method.model_validate({"full": {}, "lora": {}})) is None
