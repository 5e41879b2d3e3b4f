"""The benchmark of the trainer compares like with like."""

from __future__ import annotations

import pytest
import torch

from tests.bench.train_utilisation import shapes
from tests.bench.trainer import VOCABULARY, model_of, ratio
from yuan2_model.flops import model_flops


def test_the_products_that_stand_for_all_speed_have_the_flops_of_the_step() -> None:
    model = model_of(128, 2)
    found = sum(3 * 2 * rows * inner * outer * count for inner, outer, count, rows in shapes(model, 70, 30))
    assert found == model_flops(model.config.dimensions(), tokens=70, pairs=0, labelled=30)


def test_any_token_id_can_be_trained_on() -> None:
    model = model_of(64, 1)
    ids = torch.tensor([[5, VOCABULARY + 5, 134957]])
    output = model(input_ids=ids, labels=torch.tensor([[-100, VOCABULARY + 5, 134957]]))
    folded = ids % VOCABULARY
    again = model(input_ids=folded, labels=torch.tensor([[-100, 5, 134957 % VOCABULARY]]))
    assert output.loss.item() == again.loss.item()


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert ratio([(10.0, 1.0), (6.0, 2.0), (8.0, 2.0)]) == pytest.approx(4.0)
