"""The learning rate: transformers' own schedules, and their shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_trainer.train.schedule import rate_factor, warmup_steps

totals = st.integers(1, 5000)
ratios = st.floats(0, 1)


@given(totals, ratios, st.sampled_from(["cosine", "linear", "constant"]), st.data())
def test_a_factor_lies_between_0_and_1(total: int, ratio: float, name: str, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    assert 0 <= rate_factor(step, total, warmup_steps(total, ratio), name) <= 1  # type: ignore[arg-type]


@given(totals, ratios)
def test_it_rises_in_the_warm_up_and_falls_afterwards(total: int, ratio: float) -> None:
    warmup = warmup_steps(total, ratio)
    factors = [rate_factor(step, total, warmup, "cosine") for step in range(total)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_the_published_recipe_warms_up_for_3_percent() -> None:
    assert warmup_steps(1200, 0.03) == 36
    assert rate_factor(0, 1200, 36, "cosine") == 0
    assert rate_factor(18, 1200, 36, "cosine") == 0.5
    assert rate_factor(36, 1200, 36, "cosine") == 1
    assert rate_factor(618, 1200, 36, "cosine") == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_transformers_schedules_give_the_same_rates(name: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps(40, 0.1), num_training_steps=40)
    for step in range(40):
        assert rate_factor(step, 40, 4, name) == pytest.approx(theirs.get_last_lr()[0])  # type: ignore[arg-type]
        optimizer.step()
        theirs.step()
