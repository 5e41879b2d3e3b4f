"""The learning rate: transformers' own schedules, and their shape."""

from __future__ import annotations

from inspect import signature

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_core.sections import Training
from yuan2_trainer.train.schedule import decay_of, learning_rate, rate_factor, warmup_steps

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


@pytest.mark.parametrize("decay", [1, 7, 36])
def test_warmup_stable_decay_is_that_of_transformers(decay: int) -> None:
    import torch
    from transformers.optimization import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # Older transformers know no other decay than the cosine's and so do not ask.
    asked = {"decay_type": "cosine"} if "decay_type" in signature(get_wsd_schedule).parameters else {}
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=4, num_decay_steps=decay, num_stable_steps=36 - decay, **asked
    )
    training = Training(schedule="wsd", warmup_steps=4, decay_steps=decay, learning_rate=1.0)
    for step in range(40):
        assert learning_rate(training, step, 40) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_cosine_with_a_least_rate_is_that_of_transformers() -> None:
    import torch
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, 40, min_lr=0.1)
    training = Training(warmup_steps=0, learning_rate=0.5, min_learning_rate=0.1)
    for step in range(40):
        assert learning_rate(training, step, 40) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert learning_rate(training, 40, 40) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_warm_up_begins_at_nothing_and_the_end_is_the_least_rate(schedule: str) -> None:
    training = Training.model_validate(
        {"schedule": schedule, "warmup_steps": 5, "learning_rate": 0.5, "min_learning_rate": 0.1}
    )
    assert learning_rate(training, 0, 50) == 0
    assert learning_rate(training, 5, 50) == pytest.approx(0.5)
    assert learning_rate(training, 50, 50) == pytest.approx(0.1)


def test_a_decay_is_a_share_of_the_run_and_never_in_the_warm_up() -> None:
    assert decay_of(Training(schedule="wsd"), 1000) == 100
    assert decay_of(Training(schedule="wsd", decay_ratio=0.25), 1000) == 250
    assert decay_of(Training(schedule="wsd", decay_steps=5000, warmup_steps=40), 100) == 60
