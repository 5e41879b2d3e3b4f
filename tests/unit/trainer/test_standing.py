"""What evaluations have shown, and when one is due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_trainer.data.order import Course, Position
from yuan2_trainer.evaluation.standing import Standing, is_due

LOSSES = st.lists(st.floats(0, 10) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=12)


@given(losses=LOSSES)
def test_the_best_step_is_the_first_of_the_lowest_loss(losses: list[float]) -> None:
    standing = Standing().after(0, -1.0)
    for step, loss in enumerate(losses, start=1):
        standing = Standing.model_validate_json(standing.after(step, loss).model_dump_json())
    known = [loss for loss in losses if math.isfinite(loss)]
    assert standing.evaluated_step == len(losses)
    if known:
        assert standing.best_loss == min(known)
        assert standing.best_step == losses.index(min(known)) + 1
        assert standing.worse == len(losses) - standing.best_step
    else:
        assert standing.best_step is None
        assert standing.worse == len(losses)


def test_the_given_model_is_not_in_the_running() -> None:
    standing = Standing().after(0, 0.1)
    assert (standing.loss, standing.best_step, standing.worse) == (0.1, None, 0)
    assert standing.after(2, 5.0).best_step == 2


def test_patience_counts_evaluations_in_a_row() -> None:
    found = Standing()
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5], start=1):
        assert not found.exhausts(2)
        found = found.after(step, loss)
    assert found.exhausts(2)
    assert not found.exhausts(3)
    assert not found.exhausts(None)
    assert not found.after(5, 1.0).exhausts(2)


@pytest.mark.parametrize(("every", "expected"), [(None, [0, 3, 6, 7]), (2, [0, 2, 4, 6, 7]), (9, [0, 7])])
def test_an_evaluation_is_due_first_last_and_between(every: int | None, expected: list[int]) -> None:
    course = Course(samples=5, global_batch=2, epochs=3.0, max_steps=7)
    positions = [Position(), *(after for after, *_ in course.steps(Position()))]
    assert [at.step for at in positions if is_due(at, course, every, 7)] == expected


def test_a_step_that_was_evaluated_does_not_wait() -> None:
    assert Standing().waits_for(0)
    assert not Standing().after(4, 1.0).waits_for(4)
    assert Standing().after(4, 1.0).waits_for(6)
