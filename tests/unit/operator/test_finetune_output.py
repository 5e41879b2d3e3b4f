"""One run at a time writes an output; the second is refused with the name of the first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.attempts import spec_of
from tests.support.finetunes import finetune_object
from yuan2_operator.constants import Reason
from yuan2_operator.plan.output import reject_taken
from yuan2_operator.plan.references import Rejection

NOON, LATER = "2026-01-01T12:00:00Z", "2026-01-01T12:00:01Z"


def other(
    name: str = "first", since: str = NOON, status: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    body = finetune_object(name, "demo", **spec)
    body["metadata"]["creationTimestamp"] = since
    return {**body, "status": status or {}}


def decide(*others: dict[str, Any], begun: bool = False, since: str = LATER) -> Rejection | None:
    return reject_taken(spec_of(), "mine", begun=begun, since=since, others=others)


def ended(kind: str, status: str = "True") -> dict[str, Any]:
    return {
        "attempt": 3,
        "conditions": [{"type": "Accepted", "status": "True"}, {"type": kind, "status": status}],
    }


def test_the_second_is_refused_with_the_name_of_the_first():
    assert decide(other()) == Rejection(
        Reason.OUTPUT_IN_USE,
        "output: Yuan2FineTune first writes directory tuned of claim models; choose another path, or wait "
        "until first has ended",
    )


def test_of_two_that_have_not_begun_the_older_one_goes_first():
    assert decide(other(since=LATER), since=NOON) is None
    assert decide(other("a"), since=NOON) is not None
    assert decide(other("z"), since=NOON) is None


def test_one_that_has_begun_goes_on_and_the_older_one_waits():
    running = other(since=LATER, status={"attempt": 1})
    assert decide(running, since=NOON) is not None
    assert decide(other(), begun=True) is None
    assert decide(running, begun=True) is not None


@pytest.mark.parametrize("place", [{"claimName": "elsewhere"}, {"path": "tuned/more"}])
def test_another_place_is_free(place):
    assert decide(other(output={"persistentVolumeClaim": place})) is None


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
def test_what_has_ended_writes_no_more(kind):
    assert decide(other(status=ended(kind))) is None
    assert decide(other(status=ended(kind, "False"))) is not None


def test_what_is_being_deleted_is_left_alone():
    going = other()
    going["metadata"]["deletionTimestamp"] = NOON
    assert decide(going) is None
    assert decide(going, other("second"), other("third")).message.startswith(
        "output: Yuan2FineTune second writes"
    )
