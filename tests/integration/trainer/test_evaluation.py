"""Evaluation on real ranks: the same loss on any number of them, and a training that does not notice it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks
from tests.support.training import losses, make_job, metrics, write_data
from yuan2_trainer.methods import BITSANDBYTES_FOR_CPU, missing_package

Train = Callable[..., Path]
HELD_OUT: dict[str, Any] = {"eval_fraction": 0.3, "evaluation": {"every_steps": 3, "sample_answers": 3}}
LORA: dict[str, Any] = {"method": {"lora": {"dropout": 0.3}}, "learning_rate": 1e-2}
QLORA: dict[str, Any] = {**LORA, "method": {"qlora": {}}, "precision": "bf16"}

needs_4_bits = pytest.mark.skipif(
    missing_package("bitsandbytes", BITSANDBYTES_FOR_CPU) is not None,
    reason="no bitsandbytes for a CPU",
)


def evaluations(output: Path) -> dict[int, float]:
    """Evaluation loss by step, after checking that none is double."""
    rows = [row for row in metrics(output) if "evalLoss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["evalLoss"] for row in rows}


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "job.json").read_text())


@pytest.fixture
def reference(trained: Train) -> Path:
    return trained(**HELD_OUT)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "packing": False},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "stage": 0},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "stage": 3},
    ],
    ids=["single", "padded", "zero-0", "zero-3"],
)
def test_the_loss_depends_neither_on_ranks_nor_on_the_shape_of_batches(
    trained: Train, reference: Path, processes: int, changes: dict[str, Any]
) -> None:
    if processes == 2:
        accumulation = changes["gradient_accumulation_steps"] // 2
        changes = {**changes, "gradient_accumulation_steps": accumulation, "processes": 2}
    output = trained(**HELD_OUT, **changes)
    assert evaluations(output) == pytest.approx(evaluations(reference), abs=1e-5)
    assert [row["answer"] for row in samples(output)] == [row["answer"] for row in samples(reference)]


def test_evaluations_come_before_between_and_after_the_steps(reference: Path) -> None:
    found = evaluations(reference)
    assert list(found) == [0, 3, 6, 8]
    assert found[8] < found[0]
    rows = [row for row in metrics(reference) if "evalLoss" in row]
    assert all(row["perplexity"] == pytest.approx(torch.tensor(row["evalLoss"]).exp()) for row in rows)


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_file(
    trained: Train, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Computed again from the exported model, conversation by conversation."""
    from yuan2_core.conversation import render
    from yuan2_core.formats import load_conversations
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import Yuan2ForCausalLM

    path = write_data(tmp_path_factory.mktemp("other") / "held-out.json", 7)
    output = trained(eval_path=str(path), max_steps=2)
    model = Yuan2ForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
    tokenizer = Yuan2Tokenizer.from_pretrained(inputs[0])
    total, labelled = 0.0, 0
    for conversation in load_conversations(path):
        for sample in render(conversation, tokenizer, "split_example", 128):
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels, loss_reduction="sum").loss)
            labelled += int((labels != -100).sum())
    assert evaluations(output)[2] == pytest.approx(total / labelled, abs=1e-5)
    assert record(output)["data"]["eval_samples"] == sum(
        len(conversation.turns) for conversation in load_conversations(path)
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"stage": 3}, LORA, {**LORA, "stage": 3}, pytest.param(QLORA, marks=needs_4_bits)],
    ids=["full", "zero-3", "lora", "lora-zero-3", "qlora"],
)
def test_training_does_not_notice_that_it_is_judged(
    trained: Train, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    path = write_data(tmp_path_factory.mktemp("held-out") / "data.json", 5)
    judged = trained(eval_path=str(path), evaluation={"every_steps": 2}, **changes)
    plain = trained(**changes)
    assert losses(judged) == losses(plain)
    found = evaluations(judged)
    assert list(found) == [0, 2, 4, 6, 8]
    assert found[8] < found[0]
    assert record(judged)["exportedStep"] == min(list(found)[1:], key=lambda step: found[step])


def test_held_out_conversations_are_not_trained_on(trained: Train, reference: Path) -> None:
    assert record(reference)["data"]["samples"] + record(reference)["data"]["eval_samples"] == 49
    assert losses(reference) != losses(trained())
    for row in samples(reference):
        assert row["question"]
        assert row["reference"]


def test_sample_answers_are_what_generate_gives(reference: Path, inputs: tuple[Path, Path]) -> None:
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import Yuan2ForCausalLM
    from yuan2_trainer.samples import ANSWER_TOKENS

    tokenizer = Yuan2Tokenizer.from_pretrained(inputs[0])
    assert [row["step"] for row in samples(reference)] == [0, 0, 0, 8, 8, 8]
    for directory, rows in (
        (inputs[0], samples(reference)[:3]),
        (reference / "model", samples(reference)[3:]),
    ):
        model = Yuan2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for row in rows:
            prompt = [*tokenizer.encode(row["question"], structure=False), tokenizer.sep_id]
            ids = torch.tensor([prompt])
            made = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            ended = made[: made.index(tokenizer.eod_id)] if tokenizer.eod_id in made else made
            assert row["answer"] == tokenizer.decode(ended)


# A rate so high that the loss rises again: the best evaluation is not the last one.
OVERSHOOT: dict[str, Any] = {
    "eval_fraction": 0.3,
    "evaluation": {"every_steps": 1, "early_stopping_patience": 2, "sample_answers": 1},
    "learning_rate": 0.08,
    "schedule": "constant",
    "max_steps": 12,
    "every_steps": 3,
    "keep": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stage": 3, "processes": 2, "micro_batch_size": 4},
        {"stage": 0, "precision": "bf16"},
        {**LORA, "learning_rate": 2.0},
    ],
    ids=["full", "zero-3", "bf16", "lora"],
)
def test_training_ends_early_and_leaves_the_best_weights(trained: Train, changes: dict[str, Any]) -> None:
    output = trained(**{**OVERSHOOT, **changes})
    found = evaluations(output)
    best = min(list(found)[1:], key=lambda step: found[step])
    last = record(output)["step"]
    assert best == record(output)["exportedStep"] == last - 2
    assert last < 12
    assert list(found) == list(range(last + 1))
    assert f"step-{best:06d}" in [item.name for item in (output / "checkpoints").iterdir()]
    assert [row["step"] for row in samples(output)] == [0, best]


def test_an_interrupted_run_ends_as_the_unbroken_one(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    unbroken = trained(**OVERSHOOT)
    best = record(unbroken)["exportedStep"]
    output = tmp_path / "output"
    shutil.copytree(unbroken, output)
    shutil.rmtree(output / "model")
    (output / "job.json").unlink()
    kept = sorted(item.name for item in (output / "checkpoints").iterdir())
    base = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, **OVERSHOOT}
    job = make_job(*inputs, output, **base)
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    assert "stopped early" in outcome.message
    assert f"weights of step {best} written" in outcome.message
    assert f"going on from {kept[-1]}" in (tmp_path / "workspace" / "rank-0.log").read_text()
    assert losses(output) == losses(unbroken)
    assert evaluations(output) == evaluations(unbroken)
    assert samples(output) == samples(unbroken)
    expected = load_file(next((unbroken / "model").glob("*.safetensors")))
    again = load_file(next((output / "model").glob("*.safetensors")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
