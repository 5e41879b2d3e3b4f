"""How often a status is written, by a simulated clock: seldom, never without a change, and never too late."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tests.support.attempts import START, accepted, spec_of
from tests.support.finetunes import progress_of
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.constants import Reason
from yuan2_operator.status.attempts import Ledger, World
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.judgement import AttemptView, JobFacts
from yuan2_operator.status.pods import PodFacts, Problem
from yuan2_operator.status.progress import NEWS_KEPT, Written, write_delay, written

SPEC = spec_of()
OPEN = Ledger(attempts=(Attempt(number=1, start_time=START),), number=1, started=START)
MINUTE = timedelta(minutes=1)

SIGHTS = st.lists(
    st.tuples(
        st.sampled_from([None, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED]),
        st.sampled_from(["here", "there"]),
        st.none() | st.integers(0, 100),
    ),
    min_size=20,
    max_size=120,
)


def look(prior: FineTuneStatus, sight: tuple[str | None, str, int | None], now: datetime) -> FineTuneStatus:
    reason, words, step = sight
    problem = None if reason is None else Problem(reason, words)
    pods = tuple(
        PodFacts(f"x-1-{index}", index, 1, "Running", running=problem is None, problem=problem)
        for index in range(2)
    )
    seen = World({1: AttemptView(1, JobFacts("x-1", 1, created=START, pods=2), pods)})
    said = None if step is None else progress_of("x", step=step)
    return compose(SPEC, prior, Finding("uid", 1, OPEN, seen, accepted(), progress=said), now)


@given(sights=SIGHTS)
def test_whatever_is_seen_each_second_no_more_than_six_writes_fall_into_a_minute(sights):
    status, last, writes, now = FineTuneStatus(), None, [], START
    for sight in sights:
        now += timedelta(seconds=1)
        after = look(status, sight, now)
        if write_delay(status, after, last, now) == 0:
            assert after != status, "a write that changes nothing"
            status, last = after, written(last, status, after, now)
            writes.append(now)
    assert all(later - earlier >= MINUTE for earlier, later in zip(writes, writes[NEWS_KEPT:], strict=False))
    # What is held back is written in time, though nothing else happens.
    after = look(status, sights[-1], now)
    delay = write_delay(status, after, last, now)
    if delay:
        now += timedelta(seconds=delay)
        assert write_delay(status, look(status, sights[-1], now), last, now) == 0


def test_news_that_must_wait_says_how_long():
    prior = look(FineTuneStatus(), (None, "", None), START)
    other = look(prior, (Reason.UNSCHEDULABLE, "here", None), START)
    busy = None
    for second in range(NEWS_KEPT):
        busy = written(busy, prior, prior, START + timedelta(seconds=second))
    now = START + timedelta(seconds=20)
    assert write_delay(prior, other, busy, now) == 40.0
    assert write_delay(prior, other, busy, START + MINUTE) == 0
    assert write_delay(prior, other, Written(0, START), START) == 0


def test_what_is_decided_about_attempts_never_waits():
    prior = look(FineTuneStatus(), (None, "", None), START)
    ended = [attempt.model_copy(update={"outcome": "Stalled"}) for attempt in prior.attempts]
    busy = Written(0, START, (START,) * NEWS_KEPT)
    assert write_delay(prior, prior.model_copy(update={"attempts": ended}), busy, START) == 0
    assert write_delay(prior, prior.model_copy(update={"completion_time": START}), busy, START) == 0
    assert write_delay(prior, prior, replace(busy, recent=()), START) is None
