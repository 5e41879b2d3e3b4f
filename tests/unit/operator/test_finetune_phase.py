"""The phase of a run over the states that a kubelet and the Job controller report one after the other."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.attempts import START, accepted, spec_of
from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.constants import TRAINER_CONTAINER
from yuan2_operator.reconcile.finetune import build_world
from yuan2_operator.status.attempts import Ledger, advance, read_ledger
from yuan2_operator.status.conditions import find_condition
from yuan2_operator.status.finetune import Finding, compose

RUNNING = {"running": {"startedAt": "2026-01-01T00:00:01Z"}}
DONE = {"terminated": {"exitCode": 0, "finishedAt": "2026-01-01T00:01:00Z"}}
POD_STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Pending", {}),
    ("Pending", {"waiting": {"reason": "ContainerCreating"}}),
    ("Running", RUNNING),
    # A kubelet reports the end of the container first, that of the pod when everything of it is gone.
    ("Running", DONE),
    ("Succeeded", DONE),
)
JOB_CONDITIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("SuccessCriteriaMet",),
    ("SuccessCriteriaMet", "Complete"),
)
SPEC = spec_of()
REPLICAS = SPEC.workers.replicas


def job(conditions: tuple[str, ...]) -> dict[str, Any]:
    metadata = {"name": "x-1", "uid": "job", "labels": {"yuan2.dev/attempt": "1"}}
    status = {"conditions": [{"type": kind, "status": "True"} for kind in conditions]}
    return {"metadata": metadata, "status": status}


def pod(index: int, state: int) -> dict[str, Any]:
    phase, container = POD_STATES[state]
    labels = {"yuan2.dev/attempt": "1", "batch.kubernetes.io/job-completion-index": str(index)}
    entries = [{"name": TRAINER_CONTAINER, "state": container}] if container else []
    metadata = {"name": f"x-1-{index}", "labels": labels, "ownerReferences": [{"uid": "job"}]}
    return {
        "metadata": metadata,
        "spec": {"nodeName": "n"},
        "status": {"phase": phase, "containerStatuses": entries},
    }


def step(prior: FineTuneStatus, pods: list[dict[str, Any]], conditions: tuple[str, ...]) -> FineTuneStatus:
    world = build_world([job(conditions)], pods, strangers=False, now=START)
    ledger = advance(read_ledger(prior), world, SPEC.run_policy, accepted=False, now=START)
    return compose(SPEC, prior, Finding("uid", 1, ledger, world, accepted()), START)


def begun() -> FineTuneStatus:
    """A run whose first attempt has just been made."""
    attempts = list(Ledger().begin(1, START).attempts)
    return FineTuneStatus(phase="Pending", attempts=attempts, attempt=1)


def history(turns: list[int]) -> list[FineTuneStatus]:
    """Statuses of a run whose pods go on in this order: each number is the pod that goes on."""
    states, seen = [0] * REPLICAS, [begun()]
    for index in turns:
        states[index] += 1
        seen.append(step(seen[-1], [pod(*entry) for entry in enumerate(states)], ()))
    for conditions in JOB_CONDITIONS:
        seen.append(step(seen[-1], [pod(*entry) for entry in enumerate(states)], conditions))
    return seen


TURNS = st.permutations([index for index in range(REPLICAS) for _ in POD_STATES[1:]])


@given(TURNS)
def test_the_phase_of_an_attempt_that_succeeds_only_goes_forward(turns):
    phases = [status.phase for status in history(turns)]
    assert [phase for phase, _ in groupby(phases)] == ["Pending", "Running", "Complete"]


@given(TURNS)
def test_running_is_true_exactly_once(turns):
    conditions = [find_condition(status.conditions, "Running") for status in history(turns)]
    held = [entry is not None and entry.status == "True" for entry in conditions]
    assert [value for value, _ in groupby(held)] == [False, True, False]


@pytest.mark.parametrize("other", range(2, len(POD_STATES)))
def test_a_container_that_has_ended_well_still_counts_before_its_pod_has_ended(other):
    status = step(begun(), [pod(0, 3), pod(1, other)], ())
    assert status.phase == "Running"
