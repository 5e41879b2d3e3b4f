"""The benchmark of the trainer compares like with like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.bench.train_padding import CHUNK, EPOCHS, Pair, representative
from tests.bench.train_utilisation import shapes
from tests.bench.trainer import VOCABULARY, Sizes, compute_again, model_of
from yuan2_model.flops import model_flops


def test_the_products_that_stand_for_all_speed_have_the_flops_of_the_step() -> None:
    model = model_of(Sizes(128, 2))
    found = sum(3 * 2 * rows * inner * outer * count for inner, outer, count, rows in shapes(model, 70, 30))
    assert found == model_flops(model.config.dimensions(), tokens=70, pairs=0, labelled=30)


def test_any_token_id_can_be_trained_on() -> None:
    model = model_of(Sizes(64, 1))
    ids = torch.tensor([[5, VOCABULARY + 5, 134957]])
    output = model(input_ids=ids, labels=torch.tensor([[-100, VOCABULARY + 5, 134957]]))
    folded = ids % VOCABULARY
    again = model(input_ids=folded, labels=torch.tensor([[-100, 5, 134957 % VOCABULARY]]))
    assert output.loss.item() == again.loss.item()


def test_what_is_done_once_is_told_apart_from_what_every_epoch_does() -> None:
    pair = Pair(prepared=0.5, step=1.0, tokenised=2.0, cached=0.25, padded=8.0)
    assert pair.first() == (1.5, 10.0)
    assert pair.later() == (1.0, 8.25)
    ours, theirs = pair.run()
    assert EPOCHS * ours == pytest.approx(0.5 + EPOCHS * 1.0)
    assert EPOCHS * theirs == pytest.approx(2.0 + (EPOCHS - 1) * 0.25 + EPOCHS * 8.0)


def test_every_chunk_has_short_and_long_samples() -> None:
    lengths = np.random.default_rng(0).integers(20, 1000, 10 * CHUNK)
    order = representative(lengths)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    means = lengths[order].reshape(-1, CHUNK).mean(axis=1)
    assert np.ptp(means) < 0.05 * lengths.mean()


def test_gradient_checkpointing_is_switched_on_and_off() -> None:
    model = model_of(Sizes(64, 1))
    for wanted in (True, False):
        compute_again(model, wanted)
        assert model.model.gradient_checkpointing is wanted
