"""What a user reads in the status of a FineTune, when it is written, and what is told as an event."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.attempts import START, accepted, spec_of
from tests.support.finetunes import progress_of
from yuan2_core.contract import PEER_LOST
from yuan2_operator.api.finetune import Attempt, FineTuneStatus
from yuan2_operator.constants import CONDITION_ACCEPTED, KIND_FINETUNE, Reason
from yuan2_operator.plan.owner import Owner
from yuan2_operator.status.attempts import Ending, Ledger, World, advance
from yuan2_operator.status.conditions import Verdict, find_condition
from yuan2_operator.status.events import attempt_events, condition_events, event_manifest
from yuan2_operator.status.finetune import Finding, compose
from yuan2_operator.status.judgement import AttemptView, JobFacts
from yuan2_operator.status.patch import merge_patch
from yuan2_operator.status.pods import PodFacts, Problem
from yuan2_operator.status.progress import Written, duration_text, progress_fields, worth_writing
from yuan2_operator.status.schedule import Outlook, Rhythm, next_look
from yuan2_operator.status.stall import Pulse

SPEC = spec_of()
RHYTHM = Rhythm(poll=5.0, missing=10.0)
OPEN = Ledger(attempts=(Attempt(number=1, start_time=START),), number=1, started=START)


def pods(*phases: str, problem: Problem | None = None) -> tuple[PodFacts, ...]:
    return tuple(
        PodFacts(f"alpaca-1-{index}", index, 1, phase, running=phase == "Running", problem=problem)
        for index, phase in enumerate(phases)
    )


def world(*phases: str, problem: Problem | None = None, **job) -> World:
    view = AttemptView(1, JobFacts("alpaca-1", 1, created=START, **job), pods(*phases, problem=problem))
    return World({1: view})


def status_of(ledger: Ledger = OPEN, seen: World | None = None, prior: FineTuneStatus | None = None, **more):
    finding = Finding("uid", 3, ledger, seen or world("Running", "Running"), accepted())
    return compose(SPEC, prior or FineTuneStatus(), replace(finding, **more), START + timedelta(seconds=60))


def condition(status: FineTuneStatus, kind: str):
    found = find_condition(status.conditions, kind)
    assert found is not None
    return found


def test_every_condition_is_there_from_the_beginning():
    status = status_of(Ledger(), World())
    assert {entry.type for entry in status.conditions} == {
        "Accepted",
        "Running",
        "Suspended",
        "Complete",
        "Failed",
        "Finished",
        "Stalled",
        "Reconciling",
    }
    assert {entry.observed_generation for entry in status.conditions} == {3}
    assert (status.phase, status.method) == ("Pending", "full")


def test_running_means_that_every_pod_runs():
    assert condition(status_of(), "Running").status == "True"
    half = condition(status_of(seen=world("Running", "Pending")), "Running")
    assert (half.status, half.reason) == ("False", Reason.STARTING)
    assert "1 of 2 pods run" in half.message


def test_the_pods_of_an_attempt_are_those_of_its_job_whatever_the_spec_says_by_now():
    spec = spec_of(workers={"replicas": 3})
    finding = Finding("uid", 3, OPEN, world("Running", "Running", pods=2), accepted())
    found = condition(compose(spec, FineTuneStatus(), finding, START), "Running")
    assert (found.status, found.message) == ("True", "attempt 1: 2 of 2 pods run")


def test_a_pod_that_has_succeeded_already_does_not_end_the_training():
    assert status_of(seen=world("Running", "Succeeded")).phase == "Running"


def test_the_trouble_of_a_pod_is_the_reason():
    problem = Problem(Reason.IMAGE_PULL_FAILED, "pod alpaca-1-0 cannot pull image x: not found")
    found = condition(status_of(seen=world("Pending", "Pending", problem=problem)), "Running")
    assert found.reason == Reason.IMAGE_PULL_FAILED
    assert found.message == "pod alpaca-1-0 cannot pull image x: not found (0 of 2 pods run)"


def test_while_a_failed_attempt_ends_its_cause_is_shown_and_not_who_lost_it():
    facts = pods("Failed", "Failed")
    words = (
        Problem(PEER_LOST, "pod alpaca-1-0 lost another rank"),
        Problem("Crashed", "pod alpaca-1-1 boom"),
    )
    ended = tuple(replace(pod, problem=word) for pod, word in zip(facts, words, strict=True))
    seen = World({1: AttemptView(1, JobFacts("alpaca-1", 1, created=START, failing=True), ended)})
    assert "pod alpaca-1-1 boom" in condition(status_of(seen=seen), "Running").message


def test_a_job_that_gets_no_pods_says_where_to_look():
    begun = replace(OPEN, attempts=(Attempt(number=1, start_time=START - timedelta(minutes=1)),))
    found = condition(status_of(begun, world()), "Running")
    assert "kubectl describe job alpaca-1" in found.message


def test_progress_is_what_rank_0_says():
    status = status_of(progress=progress_of("alpaca", step=40, total=200, last_checkpoint_step=30))
    assert (status.progress, status.step, status.total_steps, status.eta) == ("40/200", 40, 200, "2m")
    assert (status.loss, status.tokens_per_second, status.last_checkpoint_step) == (1.6, 1234.6, 30)
    assert status.learning_rate == 2e-5


def test_the_newest_checkpoint_has_a_step_a_time_and_a_place():
    said = progress_of("alpaca", step=40, last_checkpoint_step=30, epoch=0.12345)
    status = status_of(progress=said)
    seen = START + timedelta(seconds=60)
    assert (status.last_checkpoint_time, status.last_checkpoint_path) == (
        seen,
        "tuned/checkpoints/step-000030",
    )
    assert status.epoch == 0.12
    finding = Finding("uid", 3, OPEN, world("Running", "Running"), accepted(), progress=said)
    assert compose(SPEC, status, finding, seen + timedelta(hours=1)).last_checkpoint_time == seen


def test_what_the_trainer_measures_stands_in_the_status():
    measured = {
        "eval_loss": 1.23456,
        "best_step": 30,
        "mfu": 0.41234,
        "memory_bytes": 39_120_000_000,
        "samples": 51_000,
        "tokens": 9_900_000,
        "dropped_samples": 4,
    }
    status = status_of(progress=progress_of("alpaca", step=40, **measured))
    assert (status.eval_loss, status.best_step, status.mfu, status.peak_memory) == (1.2346, 30, 0.412, "39G")
    assert (status.samples, status.tokens, status.dropped_samples) == (51_000, 9_900_000, 4)
    later = status_of(prior=status, progress=progress_of("alpaca", step=41))
    assert (later.eval_loss, later.best_step) == (1.2346, 30)
    assert not worth_writing(status, later, Written(40, START), START)


def test_a_trainer_that_has_just_started_does_not_wipe_the_progress():
    prior = status_of(progress=progress_of("alpaca", step=40))
    after = status_of(prior=prior, progress=progress_of("alpaca", step=0, total=0))
    assert (after.step, after.progress) == (40, "40/100")


def test_the_first_step_is_reckoned_back():
    now = START + timedelta(seconds=100)
    progress = progress_of("alpaca", step=10, seconds_in_steps=20.0, last_step_age_seconds=1.0)
    fields = progress_fields(progress, FineTuneStatus(), now)
    assert fields["first_step_time"] == now - timedelta(seconds=19)


def test_a_complete_run_names_its_model():
    ledger = replace(OPEN, ending=Ending(True, Reason.SUCCEEDED, "trained"))
    status = status_of(ledger)
    assert status.phase == "Complete"
    assert status.model is not None
    assert (status.model.claim_name, status.model.path) == ("models", "tuned/model")
    assert condition(status, "Complete").message == "the model is in claim models, directory tuned/model"
    assert condition(status, "Running").status == "False"


def test_the_root_of_a_claim_as_output():
    spec = spec_of(output={"persistentVolumeClaim": {"path": "."}})
    ledger = replace(OPEN, ending=Ending(True, Reason.SUCCEEDED, "trained"))
    finding = Finding("uid", 1, ledger, World(), accepted())
    status = compose(spec, FineTuneStatus(), finding, START)
    assert status.model is not None
    assert status.model.path == "model"


@pytest.mark.parametrize(
    ("output", "model", "adapter", "message"),
    [
        (
            {},
            "base",
            "tuned/adapter",
            "the adapter is in claim out, directory tuned/adapter",
        ),
        (
            {"mergeAdapter": True},
            "tuned/model",
            None,
            "the model is in claim out, directory tuned/model; "
            "the adapter is in claim out, directory tuned/adapter",
        ),
    ],
)
def test_an_adapter_is_named_with_its_model_unless_they_were_merged(output, model, adapter, message):
    spec = spec_of(
        method={"full": None, "qlora": {}},
        output={"persistentVolumeClaim": {"claimName": "out"}, **output},
    )
    ledger = replace(OPEN, ending=Ending(True, Reason.SUCCEEDED, "trained"))
    status = compose(spec, FineTuneStatus(), Finding("uid", 1, ledger, World(), accepted()), START)
    made = status.model
    assert made is not None
    assert made.path == model
    assert (made.adapter.path if made.adapter is not None else None) == adapter
    assert made.claim_name == ("models" if adapter else "out")
    assert condition(status, "Complete").message == message
    assert (status.method, FineTuneStatus.model_validate(status.to_api())) == ("qlora", status)


@pytest.mark.parametrize(
    ("complete", "word", "stalled"), [(True, "complete", "False"), (False, "failed", "True")]
)
def test_either_end_is_finished_and_only_a_failure_is_stalled(complete, word, stalled):
    status = status_of(replace(OPEN, ending=Ending(complete, "Why", "text")))
    finished = condition(status, "Finished")
    assert (finished.status, finished.reason, finished.message) == ("True", "Why", f"the run is {word}")
    other = condition(status, "Stalled")
    assert (other.status, other.reason, other.message) == (stalled, "Why", f"the run is {word}")
    before = [condition(status_of(), kind) for kind in ("Finished", "Stalled", "Complete", "Failed")]
    assert {(entry.status, entry.reason, entry.message) for entry in before} == {
        ("False", Reason.NOT_FINISHED, "the run has not ended")
    }


def test_an_end_is_not_explained_twice():
    ledger = replace(OPEN, ending=Ending(False, "InvalidData", "record 3 is empty"))
    once = status_of(ledger)
    assert status_of(ledger, prior=once) == once


def test_what_is_not_accepted_says_why_nothing_runs():
    refusal = Verdict(CONDITION_ACCEPTED, "False", Reason.CLAIM_NOT_FOUND, "claim x does not exist")
    found = condition(status_of(Ledger(), World(), acceptance=refusal), "Running")
    assert found.message == "no pods yet: claim x does not exist"


def test_composing_twice_changes_nothing():
    once = status_of(progress=progress_of("alpaca", step=40))
    assert status_of(prior=once, progress=progress_of("alpaca", step=40)) == once
    assert FineTuneStatus.model_validate(once.to_api()) == once


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (3500, "58m"), (7200, "2h"), (7500, "2h5m"), (266400, "3d2h")],
)
def test_durations_read_like_kubectls(seconds, text):
    assert duration_text(seconds) == text


def running_at(step: int) -> FineTuneStatus:
    begun = FineTuneStatus(first_step_time=START)
    return status_of(progress=progress_of("alpaca", step=step), prior=begun)


def test_progress_alone_is_written_by_share_or_by_time():
    prior, now = running_at(10), START + timedelta(seconds=70)
    written = Written(10, now)
    assert not worth_writing(prior, running_at(15), written, now + timedelta(seconds=5))
    assert worth_writing(prior, running_at(30), written, now + timedelta(seconds=5))
    assert worth_writing(prior, running_at(15), written, now + timedelta(seconds=60))
    assert worth_writing(prior, running_at(15), None, now)


def test_anything_else_is_written_at_once():
    prior = running_at(10)
    after = prior.model_copy(update={"restarts": 1})
    assert worth_writing(prior, after, Written(10, START), START)
    assert not worth_writing(prior, prior, None, START)


def test_another_sentence_alone_waits_ten_seconds_and_another_reason_does_not():
    early, later = (
        status_of(seen=world("Pending", problem=Problem(Reason.IMAGE_PULL_FAILED, text)))
        for text in ("not found", "unauthorized")
    )
    written = Written(0, START)
    assert not worth_writing(early, later, written, START + timedelta(seconds=9))
    assert worth_writing(early, later, written, START + timedelta(seconds=10))
    assert worth_writing(early, later, None, START)
    other = status_of(seen=world("Pending", problem=Problem(Reason.UNSCHEDULABLE, "not found")))
    assert worth_writing(early, other, written, START)


def test_sentences_about_pods_that_start_wait_for_their_turn():
    early = status_of(seen=world("Pending", "Pending"))
    later = status_of(seen=world("Running", "Pending"), prior=early)
    assert early != later
    assert not worth_writing(early, later, Written(0, START), START)


def test_an_unknown_progress_is_told_with_its_cause_and_ends_nothing():
    known = status_of(progress=progress_of("alpaca", step=40))
    status = status_of(prior=known, silence="pod alpaca-1-0 does not answer")
    found = condition(status, "Running")
    assert (found.status, found.reason) == ("True", Reason.PROGRESS_UNKNOWN)
    assert found.message == (
        "attempt 1: 2 of 2 pods run; their progress is unknown, which ends nothing: "
        "pod alpaca-1-0 does not answer"
    )
    assert (status.step, status.eta, known.eta) == (40, None, "60s")
    told = condition_events(known.conditions, status.conditions)
    assert [(event.type, event.reason) for event in told] == [("Warning", Reason.PROGRESS_UNKNOWN)]


def test_a_pod_that_fits_no_node_says_how_many_nodes_would_do():
    problem = Problem(Reason.UNSCHEDULABLE, "pod alpaca-1-0 fits no node")
    seen = world("Pending", "Pending", problem=problem)
    early = status_of(seen=seen, room="none of 3 nodes has 8 nvidia.com/gpu free")
    assert condition(early, "Running").message == (
        "pod alpaca-1-0 fits no node; none of 3 nodes has 8 nvidia.com/gpu free (0 of 2 pods run)"
    )
    later = status_of(seen=seen, prior=early, room="1 of 3 nodes has 8 nvidia.com/gpu free")
    assert later != early
    assert not worth_writing(early, later, Written(0, START), START)
    other = world("Pending", problem=Problem(Reason.IMAGE_PULL_FAILED, "no image"))
    assert condition(status_of(seen=other, room="none"), "Running").message == "no image (0 of 2 pods run)"


def look(ledger: Ledger, seen: World, status: FineTuneStatus | None = None, **changes) -> float | None:
    outlook = Outlook(ledger, seen, accepted=True, trouble=False)
    policy = changes.pop("policy", SPEC.run_policy)
    return next_look(policy, status or FineTuneStatus(), replace(outlook, **changes), RHYTHM, START)


def test_looks_come_as_often_as_they_are_needed():
    seen = replace(world("Running", "Running"), pulse=Pulse("training", 100.0, 1800.0, "field"))
    assert look(OPEN, seen) == 1700.0
    assert look(OPEN, replace(seen, pulse=Pulse("training", 1799.0, 1800.0, "field"))) == RHYTHM.poll
    assert look(OPEN, world("Pending", "Pending")) == 60.0
    assert look(Ledger(), World(), accepted=False) == RHYTHM.missing


def test_a_finished_run_is_looked_at_again_only_to_be_tidied_up():
    ended = replace(OPEN, ending=Ending(True, Reason.SUCCEEDED, "trained"))
    assert look(ended, World()) is None
    policy = SPEC.run_policy.model_copy(update={"ttl_seconds_after_finished": 90})
    assert look(ended, World(), FineTuneStatus(completion_time=START), policy=policy) == 90.0


def test_the_end_of_the_wait_for_the_other_pods_is_met():
    alone = pods("Running", "Pending")
    first = replace(alone[0], started=START - timedelta(seconds=1790))
    seen = World({1: AttemptView(1, JobFacts("alpaca-1", 1, created=START, pods=2), (first, alone[1]))})
    assert look(OPEN, seen) == 10.0


def test_a_deadline_is_met():
    policy = SPEC.run_policy.model_copy(update={"active_deadline_seconds": 3})
    assert look(OPEN, world("Running", "Running"), policy=policy) == 3.0


HOUR = timedelta(hours=1)
OUTCOMES = st.sampled_from(["Failed", "Disrupted", "Stalled", "Suspended", None])


@given(
    outcome=OUTCOMES,
    seconds=st.integers(1, 7200),
    suspend=st.booleans(),
    deadline=st.none() | st.integers(1, 7200),
    accepted=st.booleans(),
    trouble=st.booleans(),
    seen=st.sampled_from([World(), World(foreign=True), world("Running", "Pending")]),
)
def test_a_run_to_which_nothing_happens_is_looked_at_seldom(
    outcome, seconds, suspend, deadline, accepted, trouble, seen
):
    policy = SPEC.run_policy.model_copy(update={"suspend": suspend, "active_deadline_seconds": deadline})
    begun = START - timedelta(seconds=seconds)
    ended = None if outcome is None else min(begun + timedelta(seconds=30), START)
    attempt = Attempt(number=1, outcome=outcome, start_time=begun, end_time=ended)
    prior = Ledger(attempts=(attempt,), number=1, started=begun)
    now, looks = START, 0
    while now < START + HOUR:
        ledger = advance(prior, seen, policy, accepted=False, now=now)
        follows = advance(ledger, seen, policy, accepted=accepted and not trouble, now=now)
        if follows.number > 1 or follows.ending is not None:
            return
        outlook = Outlook(follows, seen, accepted=accepted, trouble=trouble)
        delay = next_look(policy, FineTuneStatus(), outlook, RHYTHM, now)
        if delay is None:
            return
        now, looks = now + timedelta(seconds=delay), looks + 1
    assert looks <= HOUR.total_seconds() / RHYTHM.poll


def test_events_tell_what_matters_and_not_the_ordinary():
    before, after = status_of(seen=world("Pending", "Pending")), status_of()
    assert [event.reason for event in condition_events(before.conditions, after.conditions)] == [
        Reason.TRAINING
    ]
    assert condition_events([], before.conditions) == []
    trouble = status_of(seen=world("Pending", problem=Problem(Reason.UNSCHEDULABLE, "no node")))
    told = condition_events(before.conditions, trouble.conditions)
    assert [(event.type, event.reason) for event in told] == [("Warning", Reason.UNSCHEDULABLE)]


def test_an_attempt_that_failed_is_told_once():
    attempt = Attempt(number=1, outcome="Failed", reason="Crashed", message="pod x ended", counted=True)
    told = attempt_events([], [attempt])
    assert [(event.type, event.reason) for event in told] == [("Warning", "AttemptFailed")]
    assert told[0].note == "attempt 1 ended, counted against maxRestarts: pod x ended"
    assert attempt_events([attempt], [attempt]) == []


def test_what_is_no_fault_of_the_run_is_told_as_normal():
    ends = [Attempt(number=n, outcome=o, message="why") for n, o in enumerate(("Disrupted", "Stalled"), 1)]
    told = attempt_events([], ends)
    assert [(event.type, event.reason) for event in told] == [
        ("Normal", "AttemptDisrupted"),
        ("Normal", "AttemptStalled"),
    ]
    assert told[0].note == "attempt 1 ended, not counted against maxRestarts: why"


def test_the_same_event_has_the_same_name():
    owner = Owner(KIND_FINETUNE, "alpaca", "demo", "uid", 1)
    event = condition_events([], status_of().conditions)[0]
    first, again = (event_manifest(owner, event, START, "op") for _ in range(2))
    assert first["metadata"]["name"] == again["metadata"]["name"]
    assert len(first["note"]) <= 1024
    assert (first["reason"], first["reportingInstance"]) == (event.reason, "op")
    assert first["eventTime"] == "2026-01-01T00:00:00.000000Z"
    assert first["regarding"] == {
        "apiVersion": "yuan2.dev/v1alpha1",
        "kind": KIND_FINETUNE,
        "name": "alpaca",
        "namespace": "demo",
        "uid": "uid",
    }


def test_merge_patches_remove_and_change_and_nothing_else():
    before = {"a": 1, "b": {"c": 1, "d": 2}, "e": [1]}
    after = {"a": 1, "b": {"c": 3}, "e": [1, 2]}
    assert merge_patch(before, after) == {"b": {"d": None, "c": 3}, "e": [1, 2]}
    assert merge_patch(after, after) == {}
