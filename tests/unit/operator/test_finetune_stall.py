"""What ends an attempt as hung: only rank 0's own word, beyond the limit of its phase."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.support.attempts import START, spec_of
from tests.support.finetunes import progress_of
from yuan2_core.presets import PRESETS
from yuan2_operator.api.finetune import Attempt
from yuan2_operator.plan.limits import PhaseLimit, phase_limit
from yuan2_operator.status.stall import RANKS_TOLD, Pulse, take_pulse, whereabouts

SPEC = spec_of(model={"size": "2B"}, runPolicy={"stallTimeoutSeconds": 60})
TOGETHER = Attempt(number=1, start_time=START, running_time=START)
NOW = START + timedelta(days=1)
POLICY = "spec.runPolicy"


def pulse(spec=SPEC, attempt: Attempt | None = TOGETHER, now=NOW, **said) -> Pulse | None:
    return take_pulse(spec, progress_of("x", step=3, seconds_in_steps=6.0, **said), attempt, now)


def test_a_step_that_takes_longer_than_the_limit_is_a_hang():
    within, beyond = (pulse(last_step_age_seconds=age, state_age_seconds=900.0) for age in (60.0, 60.5))
    assert within == Pulse("training", 60.0, 60.0, f"{POLICY}.stallTimeoutSeconds")
    assert (within.hangs, within.left) == (False, 0.0)
    assert (beyond.hangs, beyond.left) == (True, 0.0)
    assert pulse(last_step_age_seconds=50.0, state_age_seconds=900.0).left == 10.0


def test_the_sentence_names_phase_time_limit_and_way_out():
    assert Pulse("training", 60.6, 60.0, "spec.x").sentence == (
        "rank 0 reports no optimizer step for 61 s, more than the 60 s of spec.x: a rank, the loader or the "
        "storage hangs; raise the limit if it is only slow"
    )
    assert Pulse("saving", 61.0, 60.0, "spec.x").sentence.startswith(
        "rank 0 reports no end of saving for 61 s, "
    )


def test_a_silent_pod_has_no_pulse():
    assert take_pulse(SPEC, None, TOGETHER, NOW) is None


def test_pods_that_do_not_run_together_yet_have_no_pulse():
    assert pulse(attempt=None) is None
    assert pulse(attempt=Attempt(number=1, start_time=START)) is None


def test_time_before_all_pods_ran_does_not_count():
    found = pulse(now=START + timedelta(seconds=9), last_step_age_seconds=500.0, state_age_seconds=500.0)
    assert found.idle == 9.0


@pytest.mark.parametrize("state", ["loading", "saving", "exporting", "evaluating", "preparing", "starting"])
def test_other_phases_are_not_a_missing_step(state):
    found = pulse(state=state, last_step_age_seconds=3000.0, state_age_seconds=2900.0)
    field = "preparing" if state == "starting" else state
    assert (found.idle, found.field) == (2900.0, f"{POLICY}.phaseTimeoutSeconds.{field}")
    assert not found.hangs


def test_after_a_checkpoint_the_step_has_all_its_time_again():
    assert pulse(last_step_age_seconds=500.0, state_age_seconds=4.0).idle == 4.0


def test_micro_batches_of_an_evaluation_are_signs_of_life():
    assert pulse(state="evaluating", last_step_age_seconds=5.0, state_age_seconds=500.0).idle == 5.0


@pytest.mark.parametrize("state", ["complete", "preempted", "failed"])
def test_what_is_over_hangs_no_more(state):
    assert pulse(state=state, state_age_seconds=1e6) is None


def test_a_trainer_that_tells_no_age_of_its_phase_is_known_by_its_steps_only():
    assert pulse(last_step_age_seconds=7.0).idle == 7.0
    assert pulse(state="evaluating", last_step_age_seconds=7.0).idle == 7.0
    assert pulse(state="exporting", last_step_age_seconds=7.0) is None
    assert pulse(last_step_age_seconds=None) is None


@pytest.mark.parametrize(
    ("size", "state", "seconds"),
    [
        ("2B", "starting", 14_400),
        ("2B", "preparing", 14_400),
        ("2B", "loading", 4_080),
        ("2B", "training", 1_908),
        ("2B", "evaluating", 3_816),
        ("2B", "saving", 3_960),
        ("2B", "exporting", 4_080),
        ("51B", "training", 3_672),
        ("102B", "training", 5_508),
        ("102B", "exporting", 20_080),
        ("custom", "training", 5_508),
    ],
)
def test_limits_follow_from_the_size(size, state, seconds):
    assert phase_limit(spec_of(model={"size": size}), state).seconds == seconds
    assert set(PRESETS) == {"2B", "51B", "102B"}


def test_a_step_may_take_ten_times_the_others_unless_the_user_says_otherwise():
    spec = spec_of(model={"size": "2B"})
    assert phase_limit(spec, "training", 190.0).seconds == 1_908
    assert phase_limit(spec, "training", 300.0).seconds == 3_000
    assert phase_limit(spec, "saving", 9e9).seconds == 3_960
    assert phase_limit(SPEC, "training", 300.0) == PhaseLimit(60.0, f"{POLICY}.stallTimeoutSeconds")
    found = take_pulse(
        spec, progress_of("x", step=12, resumed_from_step=10, seconds_in_steps=800.0), TOGETHER, NOW
    )
    assert found.limit == 4_000
    fresh = take_pulse(
        spec, progress_of("x", step=10, resumed_from_step=10, seconds_in_steps=0.0), TOGETHER, NOW
    )
    assert fresh.limit == 1_908


@pytest.mark.parametrize("phase", ["preparing", "loading", "evaluating", "saving", "exporting"])
def test_each_limit_can_be_set(phase):
    spec = spec_of(runPolicy={"phaseTimeoutSeconds": {phase: 77}})
    assert phase_limit(spec, phase) == PhaseLimit(77.0, f"{POLICY}.phaseTimeoutSeconds.{phase}")
    assert phase_limit(spec, "complete") is None


STACKS = """=== rank 4 (pid 12) ===
Thread 0x1 (most recent call first):
  File "/usr/lib/threading.py", line 9 in wait

Current thread 0x2 (most recent call first):
  File "/site/torch/distributed_c10d.py", line 2810 in all_reduce
  File "/app/loop.py", line 3 in run

=== rank 5 (pid 13) ===
wrote no stack within 2 s; the kernel says of it: D (disk sleep)
"""


def test_the_places_of_ranks_are_told_in_a_few_words():
    assert whereabouts({"x-1-1": STACKS, "x-1-2": "no stacks from port 9391: refused"}) == (
        "rank 4: in all_reduce (distributed_c10d.py:2810), "
        "rank 5: wrote no stack within 2 s; the kernel says of it: D (disk sleep), "
        "pod x-1-2: no stacks from port 9391: refused"
    )
    assert whereabouts({}) == ""
    many = "".join(f"=== rank {rank} (pid 9) ===\nhas ended\n" for rank in range(RANKS_TOLD + 3))
    assert whereabouts({"x": many}).endswith("rank 7: has ended and 3 more")
    assert Pulse("training", 61.0, 60.0, "spec.x", "rank 0: in f (a.py:1)").sentence.endswith(
        "if it is only slow; rank 0: in f (a.py:1)"
    )
