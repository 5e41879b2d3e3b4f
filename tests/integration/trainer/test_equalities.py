"""What must not change the result: batch shape, number of ranks, ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.training import losses, metrics

Train = Callable[..., Path]

TOLERANCE = 1e-5


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "model").glob("*.safetensors")))


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=TOLERANCE)
    norms = [[row["gradNorm"] for row in metrics(output)] for output in (one, other)]
    assert norms[0] == pytest.approx(norms[1], abs=TOLERANCE, rel=TOLERANCE)
    expected = weights(other)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, expected[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (4, 2)])
def test_batch_shape_changes_neither_loss_nor_gradients(
    trained: Train, micro: int, accumulation: int
) -> None:
    shaped = trained(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    assert_same_run(shaped, trained())


@pytest.mark.numbers
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_compute_what_one_does(trained: Train, stage: int) -> None:
    split = trained(processes=2, micro_batch_size=2, gradient_accumulation_steps=2, stage=stage)
    assert_same_run(split, trained())


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stage_changes_nothing(trained: Train, stage: int) -> None:
    assert_same_run(trained(stage=stage), trained())


@pytest.mark.numbers
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_follows_fp32_and_exports_bf16(trained: Train, stage: int) -> None:
    output = trained(processes=2, micro_batch_size=4, precision="bf16", stage=stage)
    # A result in bf16 is off by up to 2^-8 of itself; the loss is a mean over hundreds of tokens, each summed
    # from many results whose errors have either sign.
    assert losses(output) == pytest.approx(losses(trained()), rel=2**-8)
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(trained: Train) -> None:
    assert_same_run(trained(gradient_checkpointing=False), trained())


def test_the_loss_is_the_mean_over_labelled_tokens_of_the_global_batch(
    trained: Train, inputs: tuple[Path, Path]
) -> None:
    """The first step, whose rate is 0, against the plain loss of each of its samples."""
    from yuan2_core.conversation import render
    from yuan2_core.formats import load_conversations
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import load_model
    from yuan2_trainer.data.order import epoch_order

    model_directory, data = inputs
    tokenizer = Yuan2Tokenizer.from_pretrained(model_directory)
    rendered = [render(conversation, tokenizer) for conversation in load_conversations(data)]
    samples = [item for items in rendered for item in items]
    conversations = np.repeat(np.arange(len(rendered)), [len(items) for items in rendered])
    model = load_model(model_directory)
    total, count = 0.0, 0
    for index in epoch_order(conversations, seed=42, epoch=0)[:8]:
        labels = torch.tensor([samples[index].labels])
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([samples[index].input_ids]), labels=labels).loss
        total, count = total + loss.item() * learned, count + learned
    assert losses(trained())[0] == pytest.approx(total / count, abs=TOLERANCE)
    assert metrics(trained())[0]["labelledTokens"] == count


def test_every_sample_of_an_epoch_is_seen_once(trained: Train) -> None:
    rows = metrics(trained())
    first_epoch = [row for row in rows if row["epoch"] <= 1]
    assert len(first_epoch) == 7
    assert first_epoch[-1]["epoch"] == 1
    assert sum(row["tokens"] for row in first_epoch) == sum(
        row["tokens"] for row in metrics(trained(micro_batch_size=1, gradient_accumulation_steps=8))[:7]
    )


def test_a_run_leaves_the_model_tokenizer_and_a_record(trained: Train) -> None:
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import load_model

    output = trained()
    load_model(output / "model")
    assert Yuan2Tokenizer.from_pretrained(output / "model").sep_id > 0
    record = json.loads((output / "job.json").read_text())
    assert record["complete"] is True
    assert record["step"] == 8
    assert record["job"]["training"]["microBatchSize"] == 8
    assert set(record["versions"]) >= {"python", "torch", "deepspeed"}
