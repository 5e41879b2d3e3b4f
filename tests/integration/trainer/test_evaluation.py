"""Evaluation on real ranks: the same loss on any number of them, and a training that does not notice it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.trainer.test_methods import LORA, QLORA
from tests.support.ranks import run_ranks, start_ranks
from tests.support.training import losses, make_job, metrics, write_data
from yuan2_trainer.checkpoint.manifest import checkpoint_name, open_checkpoint
from yuan2_trainer.checkpoint.shards import ShardReader
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.progress import read_snapshot

Train = Callable[..., Path]
HELD_OUT: dict[str, Any] = {"eval_fraction": 0.3, "evaluation": {"every_steps": 3, "sample_answers": 3}}
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
EVERY_SECOND = {"every_steps": 2, "sample_answers": 0}
BASE: dict[str, Any] = {"micro_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("other") / "held-out.json", 7)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8, "packing": False, "stage": 0},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "stage": 3},
        {"micro_batch_size": 4, "processes": 2, "stage": 3, "deepspeed": {"offload": "parameters"}},
    ],
    ids=["alone", "two-ranks", "zero-3", "zero-3-two-ranks-offloaded"],
)
def test_the_loss_depends_neither_on_ranks_nor_on_the_shape_of_batches(
    trained: Train, reference: Path, changes: dict[str, Any]
) -> None:
    output = trained(**HELD_OUT, **changes)
    assert evaluations(output) == pytest.approx(evaluations(reference), abs=1e-5)
    assert [row["answer"] for row in samples(output)] == [row["answer"] for row in samples(reference)]


def test_evaluations_come_before_between_and_after_the_steps(reference: Path) -> None:
    found = evaluations(reference)
    assert list(found) == [0, 3, 6, 8]
    assert found[8] < found[0]
    rows = [row for row in metrics(reference) if "evalLoss" in row]
    assert all(row["perplexity"] == pytest.approx(torch.tensor(row["evalLoss"]).exp()) for row in rows)


@pytest.fixture
def judged(trained: Train, other_data: Path) -> Train:
    """Trained as without evaluation, but judged on data of its own."""
    return lambda **changes: trained(eval_path=str(other_data), evaluation=EVERY_SECOND, **changes)


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_the_file(
    judged: Train, inputs: tuple[Path, Path], other_data: Path
) -> None:
    """Computed again from the exported model, conversation by conversation."""
    from yuan2_core.conversation import render
    from yuan2_core.formats import load_conversations
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import Yuan2ForCausalLM

    output = judged()
    model = Yuan2ForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
    tokenizer = Yuan2Tokenizer.from_pretrained(inputs[0])
    total, labelled, count = 0.0, 0, 0
    for conversation in load_conversations(other_data):
        for sample in render(conversation, tokenizer, "split_example", 128):
            ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels, loss_reduction="sum").loss)
            labelled += int((labels != -100).sum())
            count += 1
    assert evaluations(output)[record(output)["exportedStep"]] == pytest.approx(total / labelled, abs=1e-5)
    assert record(output)["data"]["eval_samples"] == count
    assert record(output)["data"]["samples"] == 49


@pytest.mark.parametrize(
    "changes",
    [{}, LORA, {**LORA, "stage": 3}, QLORA],
    ids=["full", "lora", "lora-zero-3", "qlora"],
)
def test_training_does_not_notice_that_it_is_judged(
    trained: Train, judged: Train, changes: dict[str, Any]
) -> None:
    output = judged(**changes)
    assert losses(output) == losses(trained(**changes))
    found = evaluations(output)
    assert list(found) == [0, 2, 4, 6, 8]
    assert found[8] < found[0]
    assert record(output)["exportedStep"] == min(list(found)[1:], key=lambda step: found[step])


def test_held_out_conversations_are_not_trained_on(trained: Train, reference: Path) -> None:
    assert record(reference)["data"]["samples"] + record(reference)["data"]["eval_samples"] == 49
    assert losses(reference) != losses(trained())
    for row in samples(reference):
        assert row["question"]
        assert row["reference"]


def test_sample_answers_are_what_generate_gives(reference: Path, inputs: tuple[Path, Path]) -> None:
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import Yuan2ForCausalLM
    from yuan2_trainer.evaluation.samples import ANSWER_TOKENS

    tokenizer = Yuan2Tokenizer.from_pretrained(inputs[0])
    assert [row["step"] for row in samples(reference)] == [0, 0, 0, 8, 8, 8]
    for directory, row in ((inputs[0], samples(reference)[1]), (reference / "model", samples(reference)[5])):
        model = Yuan2ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        prompt = [*tokenizer.encode(row["question"], structure=False), tokenizer.sep_id]
        made = model.generate(torch.tensor([prompt]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answer = made[0, len(prompt) :].tolist()
        ended = answer[: answer.index(tokenizer.eod_id)] if tokenizer.eod_id in answer else answer
        assert row["answer"] == tokenizer.decode(ended)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stage": 3, "processes": 2, "micro_batch_size": 4, "deepspeed": {"offload": "parameters"}},
        {"method": {"lora": {}}, "learning_rate": 2.0, "stage": 0, "precision": "bf16"},
    ],
    ids=["full", "zero-3-offloaded", "lora-bf16"],
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
    if "method" not in changes:
        assert_exported(output, best)


def assert_exported(output: Path, step: int) -> None:
    """The model in the output is that of a checkpoint."""
    found = open_checkpoint(output / "checkpoints" / checkpoint_name(step), pytest.fail)
    assert found is not None
    reader = ShardReader(found)
    exported = load_file(next((output / "model").glob("*.safetensors")))
    assert set(found.manifest.shapes) == set(exported) - {"lm_head.weight"}  # tied to the embedding
    for name in found.manifest.shapes:
        assert torch.equal(exported[name], reader.full(name)), name


@pytest.mark.parametrize("lost", [0, 1], ids=["after-the-last-step", "at-the-best-step"])
def test_an_interrupted_run_ends_as_the_unbroken_one(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path, lost: int
) -> None:
    """What evaluations found is part of a checkpoint, as exact as the rest."""
    unbroken = trained(**OVERSHOOT)
    best = record(unbroken)["exportedStep"]
    output = tmp_path / "output"
    shutil.copytree(unbroken, output)
    shutil.rmtree(output / "model")
    (output / "job.json").unlink()
    kept = sorted((output / "checkpoints").iterdir())
    assert [item.name for item in kept] == [f"step-{step:06d}" for step in (best, best + 2)]
    for directory in kept[2 - lost :]:
        shutil.rmtree(directory)
    job = make_job(*inputs, output, **BASE, **OVERSHOOT)
    outcome = run_ranks(job, tmp_path / "workspace")[0]
    assert f"stopped early at step {best + 2} of 12" in outcome.message
    assert f"weights of step {best} written" in outcome.message
    assert f"going on from {kept[1 - lost].name}" in (tmp_path / "workspace" / "rank-0.log").read_text()
    told = read_snapshot(Workspace(tmp_path / "workspace"))
    assert (told.state, told.step, told.total_steps) == ("complete", best + 2, best + 2)
    assert (told.best_step, told.eval_loss) == (best, evaluations(output)[best + 2])
    assert losses(output) == losses(unbroken)
    assert evaluations(output) == evaluations(unbroken)
    assert samples(output) == samples(unbroken)
    expected = load_file(next((unbroken / "model").glob("*.safetensors")))
    again = load_file(next((output / "model").glob("*.safetensors")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


def test_a_pod_asked_to_end_leaves_an_evaluation_and_the_next_one_makes_it(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "eval_path": str(write_data(tmp_path / "held-out.json", 150)),
        "evaluation": {"every_steps": 2, "sample_answers": 0},
        "packing": False,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "processes": 2,
        "max_steps": 4,
    }
    unbroken = tmp_path / "unbroken"
    assert run_ranks(make_job(*inputs, unbroken, **changes), tmp_path / "u")[0].exit_code == 0
    job = make_job(*inputs, tmp_path / "output", **changes)
    workspace, ranks = start_ranks(job, tmp_path / "first")
    while not _evaluates(workspace, 2):
        assert ranks[0].is_alive()
        ranks[0].join(0.01)
    workspace.stop.touch()
    asked = time.monotonic()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 75
    assert time.monotonic() - asked < 30
    assert list(evaluations(tmp_path / "output")) == [0]
    assert [item.name for item in (tmp_path / "output" / "checkpoints").iterdir()] == ["step-000002"]
    assert run_ranks(job, tmp_path / "second")[0].exit_code == 0
    assert "going on from step-000002" in (tmp_path / "second" / "rank-0.log").read_text()
    assert evaluations(tmp_path / "output") == evaluations(unbroken)
    assert losses(tmp_path / "output") == losses(unbroken)


def _evaluates(workspace: Workspace, step: int) -> bool:
    snapshot = read_snapshot(workspace)
    return (snapshot.state, snapshot.step) == ("evaluating", step)


def test_a_pod_asked_to_end_before_the_first_step_has_nothing_to_save(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    job = make_job(*inputs, tmp_path / "output", **BASE, **HELD_OUT)
    workspace, ranks = start_ranks(job, tmp_path / "workspace")
    workspace.stop.touch()
    ranks[0].join(60)
    assert ranks[0].exitcode == 75
    assert "asked to end before step 1; the next attempt begins anew" in workspace.outcome(0).read_text()


def test_other_evaluation_data_are_another_run(
    trained: Train, judged: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    changed = {**OVERSHOOT, "eval_fraction": 0.4}
    for name, made, changes, words in (
        ("fraction", trained(**OVERSHOOT), changed, "dataset.evalFraction was 0.3 and is 0.4"),
        (
            "file",
            judged(**LORA),
            {**LORA, "eval_path": str(write_data(tmp_path / "another.json", 8)), "max_steps": 8},
            "the data of dataset.evalSource, which its evaluations are compared on, changed",
        ),
    ):
        output = tmp_path / name
        shutil.copytree(made, output)
        outcome = run_ranks(make_job(*inputs, output, **BASE, **changes), tmp_path / f"{name}-workspace")[0]
        assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
        assert words in outcome.message


def test_a_loss_that_is_no_number_in_three_steps_fails_the_run(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {**BASE, "learning_rate": 1e30, "warmup_steps": 1, "every_steps": 1, "max_steps": 8}
    outcome = run_ranks(make_job(*inputs, tmp_path / "output", **changes), tmp_path / "workspace")[0]
    assert (outcome.exit_code, outcome.reason) == (78, "InvalidJob")
    assert "was not a finite number from step 3 to 5" in outcome.message
    kept = sorted(item.name for item in (tmp_path / "output" / "checkpoints").iterdir())
    assert f"the last good checkpoint is that of step {int(kept[-1][5:])}" in outcome.message
    assert not (tmp_path / "output" / "model").exists()
