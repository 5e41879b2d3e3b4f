"""The order of the data: nothing lost, nothing twice, the same again after a break."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_core.sections import Training
from yuan2_trainer.data.order import Course, Position, epoch_order, micro_batches, share_of_rank

samples = st.integers(1, 200)


@given(samples, st.integers(0, 2**63), st.integers(0, 50))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(np.arange(count), seed, epoch)) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    orders = [tuple(epoch_order(np.arange(50), seed, epoch)) for seed in (0, 1, 42) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)
    assert list(epoch_order(np.arange(8), 42, 0)) == [3, 6, 0, 4, 7, 1, 2, 5]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(0, 99))
def test_samples_of_a_conversation_stay_neighbours_in_their_order(sizes: list[int], seed: int) -> None:
    conversations = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    order = epoch_order(conversations, seed, 0)
    assert sorted(order) == list(range(sum(sizes)))
    runs = np.split(order, np.flatnonzero(np.diff(conversations[order])) + 1)
    assert len(runs) == len(sizes)
    assert all(np.array_equal(run, np.sort(run)) for run in runs)


@given(samples, st.integers(1, 64), st.floats(0.05, 4.0))
def test_a_course_takes_every_sample_of_every_whole_epoch_once(count: int, batch: int, epochs: float) -> None:
    course = Course(count, batch, epochs)
    seen: dict[int, list[int]] = {}
    steps = list(course.steps(Position()))
    for _, epoch, first, last in steps:
        assert 0 < last - first <= batch
        seen.setdefault(epoch, []).extend(range(first, last))
    for epoch, taken in seen.items():
        assert taken == list(range(course.epoch_length(epoch)))
        assert epoch >= int(epochs) or len(taken) == count
    assert len(steps) == course.total_steps(Position())
    assert [position.step for position, *_ in steps] == list(range(1, len(steps) + 1))


@given(samples, st.integers(1, 64), st.floats(0.05, 4.0), st.data())
def test_a_broken_course_goes_on_where_it_stood(
    count: int, batch: int, epochs: float, data: st.DataObject
) -> None:
    course = Course(count, batch, epochs)
    whole = list(course.steps(Position()))
    cut = data.draw(st.integers(0, len(whole)))
    at = whole[cut - 1][0] if cut else Position()
    assert whole[:cut] + list(course.steps(at)) == whole
    assert course.total_steps(at) == len(whole)


@given(samples, st.integers(1, 64), st.integers(1, 64), st.data())
def test_another_global_batch_neither_loses_nor_repeats_a_sample(
    count: int, batch: int, other: int, data: st.DataObject
) -> None:
    before = list(Course(count, batch, 2).steps(Position()))
    cut = data.draw(st.integers(1, len(before)))
    after = list(Course(count, other, 2).steps(before[cut - 1][0]))
    taken = [(epoch, index) for _, epoch, first, last in before[:cut] + after for index in range(first, last)]
    assert taken == [(epoch, index) for epoch in (0, 1) for index in range(count)]


@pytest.mark.parametrize(
    ("epochs", "count", "expected"), [(0.1, 30, 3), (1 / 3, 10, 4), (1.0, 10, 10), (0.5, 7, 4)]
)
def test_a_fraction_of_an_epoch_is_rounded_up(epochs: float, count: int, expected: int) -> None:
    assert Course(count, 4, epochs).epoch_length(0) == expected


@given(samples, st.integers(1, 64), st.integers(1, 40))
def test_max_steps_is_what_it_says(count: int, batch: int, limit: int) -> None:
    training = Training(max_steps=limit)
    steps = list(Course.of(training, count, batch).steps(Position()))
    assert len(steps) == limit


def test_three_epochs_are_the_default() -> None:
    assert Course.of(Training(), 10, 10).total_steps(Position()) == 3


@given(st.lists(st.integers(1, 99), min_size=1, max_size=70), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_a_global_batch(lengths: list[int], size: int, ranks: int) -> None:
    batch = np.arange(len(lengths))
    cut = micro_batches(batch, np.array(lengths, dtype=np.int32), size)
    shares = [share_of_rank(cut, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    given_out = [index for share in shares for micro in share if micro is not None for index in micro]
    assert sorted(given_out) == list(range(len(lengths)))
    longest = [max(lengths[index] for index in micro) for micro in cut]
    assert longest == sorted(longest, reverse=True)
