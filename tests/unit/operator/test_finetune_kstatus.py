"""What Flux and `kubectl wait` make of a run: as of a Job, its start is waited for and its end is not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.support.attempts import START, accepted, spec_of
from tests.support.kstatus import kstatus
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.constants import CONDITION_ACCEPTED, Reason
from yuan2_operator.status.attempts import Ending, Ledger, World
from yuan2_operator.status.conditions import Verdict
from yuan2_operator.status.events import condition_events
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.pods import Problem

OPEN = Ledger(attempts=(Attempt(number=1, start_time=START),), number=1, started=START)
RESTARTING = Ledger(attempts=(Attempt(number=1, outcome="Failed", end_time=START),), number=1, started=START)
REFUSED = Verdict(CONDITION_ACCEPTED, "False", Reason.CLAIM_NOT_FOUND, "claim x does not exist")
REFUSAL = Problem(Reason.RECONCILE_FAILED, "the cluster refused an object")


def finding(ledger: Ledger, acceptance: Verdict | None = None, trouble: Problem | None = None) -> Finding:
    return Finding("uid", 3, ledger, World(), acceptance or accepted(), trouble=trouble)


def seen(found: Finding, generation: int = 3, **policy: object) -> str:
    status = compose(spec_of(runPolicy=policy), FineTuneStatus(), found, START)
    return kstatus({"metadata": {"generation": generation}, "status": status.to_api()})


@pytest.mark.parametrize(
    ("ledger", "said"),
    [
        (Ledger(), "InProgress"),
        (OPEN, "Current"),
        (RESTARTING, "Current"),
        (replace(OPEN, ending=Ending(True, Reason.SUCCEEDED, "trained")), "Current"),
        (replace(OPEN, ending=Ending(False, Reason.TOO_MANY_RESTARTS, "boom")), "Failed"),
    ],
)
def test_a_failed_run_is_told_from_a_healthy_one_and_its_end_is_not_waited_for(ledger, said):
    assert seen(finding(ledger)) == said
    assert seen(finding(ledger), generation=4) == "InProgress", "the spec has changed since"


def test_what_is_refused_is_not_current():
    assert seen(finding(Ledger(), REFUSED)) == "InProgress"
    assert seen(finding(RESTARTING, REFUSED)) == "InProgress"
    assert seen(finding(OPEN, trouble=REFUSAL)) == "InProgress"
    assert seen(finding(Ledger()), suspend=True) == "Current", "as a suspended Job is"


def test_an_end_holds_for_a_later_spec_and_is_no_news_then():
    ended = finding(replace(OPEN, ending=Ending(False, Reason.TOO_MANY_RESTARTS, "boom")))
    once = compose(spec_of(), FineTuneStatus(), ended, START)
    again = compose(spec_of(), once, replace(ended, generation=4), START + timedelta(hours=1))
    assert again.observed_generation == 4
    assert {condition.observed_generation for condition in again.conditions} == {4}
    before, after = (
        [condition.model_dump(exclude={"observed_generation"}) for condition in status.conditions]
        for status in (once, again)
    )
    assert before == after
    assert condition_events(once.conditions, again.conditions) == []
