"""Five hours of a run by a simulated clock, decided by the operator's own code."""

from __future__ import annotations

from itertools import pairwise
from math import log

import pytest

from tests.bench.simulated import Run, Simulation
from yuan2_operator.config import Settings
from yuan2_operator.status.progress import WRITE_SECONDS, WRITE_SECONDS_GROWTH

FIVE_HOURS = Run(5 * 3600, 1500, 10)
AT_ONCE = 25
"""Writes that do not wait for the clock: conditions, the first step, a fifth of the steps."""


@pytest.fixture(scope="module")
def five_hours() -> Simulation:
    return Simulation(FIVE_HOURS).go()


def test_a_long_run_ends_complete_with_the_last_word_of_its_trainer(five_hours):
    status = five_hours.status
    assert status.phase == "Complete"
    assert (status.step, status.last_checkpoint_step) == (1500, 1500)


def test_a_short_run_keeps_to_the_budget_that_the_integration_test_has():
    made = Simulation(Run(50, 20, 2)).go()
    assert sum(made.requests.values()) <= 20
    assert made.requests["status"] == len(made.writes)


def test_a_long_run_is_written_as_often_as_the_formula_says_and_no_more(five_hours):
    # Every `WRITE_SECONDS` until an age at which the growing interval is longer, from then on geometrically.
    turn = WRITE_SECONDS / WRITE_SECONDS_GROWTH
    expected = turn / WRITE_SECONDS + log(FIVE_HOURS.seconds / turn) / log(1 + WRITE_SECONDS_GROWTH)
    assert 0.7 * expected < five_hours.requests["status"] < expected + AT_ONCE


def test_nobody_waits_longer_for_news_than_the_formula_says(five_hours):
    slack = WRITE_SECONDS + Settings().poll_seconds
    for before, after in pairwise(five_hours.writes):
        assert after - before <= max(WRITE_SECONDS, after * WRITE_SECONDS_GROWTH) + slack
