"""Conditions keep the time of their last transition."""

from __future__ import annotations

from datetime import timedelta

from tests.support.services import NOW
from yuan2_operator.status.conditions import Verdict, is_true, set_condition, set_conditions, transitions

READY = Verdict("Ready", "True", "Ready", "answers")
LATER = NOW + timedelta(minutes=1)


def test_a_new_condition_is_dated_now():
    [condition] = set_condition([], READY, now=NOW, generation=1)
    assert (condition.last_transition_time, condition.observed_generation) == (NOW, 1)


def test_the_same_status_keeps_its_time_but_takes_the_new_words():
    before = set_condition([], READY, now=NOW, generation=1)
    again = Verdict("Ready", "True", "Other", "still answers")
    [condition] = set_condition(before, again, now=LATER, generation=2)
    assert condition.last_transition_time == NOW
    assert (condition.reason, condition.message, condition.observed_generation) == (
        "Other",
        "still answers",
        2,
    )


def test_another_status_is_dated_anew_and_stays_in_its_place():
    verdicts = [Verdict("Accepted", "True", "Valid", ""), READY]
    before = set_conditions([], verdicts, now=NOW, generation=1)
    after = set_condition(before, Verdict("Accepted", "False", "Gone", ""), now=LATER, generation=1)
    assert [condition.type for condition in after] == ["Accepted", "Ready"]
    assert after[0].last_transition_time == LATER
    assert not is_true(after, "Accepted")


def test_a_message_never_outgrows_the_schema():
    long = Verdict("Ready", "True", "Ready", "x" * 40000)
    [condition] = set_condition([], long, now=NOW, generation=1)
    assert len(condition.message) == 32768


def test_only_what_is_new_is_worth_an_event():
    before = set_condition([], READY, now=NOW, generation=1)
    after = set_conditions(
        before, [READY, Verdict("Degraded", "True", "Crashed", "")], now=LATER, generation=1
    )
    assert [condition.type for condition in transitions(before, after)] == ["Degraded"]
