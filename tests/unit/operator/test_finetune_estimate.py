"""What a run will need stands in its plan: memory, hours and what to change, or honestly nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.support.attempts import START, accepted, spec_of
from tests.support.finetunes import progress_of
from yuan2_core.estimate import GPUS
from yuan2_operator.api.finetune import FineTuneSpec, FineTuneStatus
from yuan2_operator.constants import CONDITION_ACCEPTED, Reason
from yuan2_operator.plan.estimate import (
    PreparedData,
    acceptance,
    estimate_of,
    gpu_of,
    status_estimate,
)
from yuan2_operator.plan.quantity import decimal_gigabytes
from yuan2_operator.status.attempts import Ending, Ledger, World
from yuan2_operator.status.conditions import Verdict
from yuan2_operator.status.events import condition_events
from yuan2_operator.status.finetune import Finding, compose

ALPACA = PreparedData(samples=52_000, tokens=52_000 * 195)


def on_gpus(product: str | None = "NVIDIA-L20", size: str = "51B", **changes) -> FineTuneSpec:
    label = {"nvidia.com/gpu.product": product} if product is not None else None
    workers = {"replicas": 1, "processesPerWorker": None, "gpusPerWorker": 8, "nodeSelector": label}
    method = {"full": None, "lora": {}}
    return spec_of(**{"model": {"size": size}, "method": method, "workers": workers, **changes})


def words(spec: FineTuneSpec, prepared: PreparedData | None = None) -> tuple[str, str]:
    return acceptance(spec, estimate_of(spec, prepared))


def test_memory_is_told_before_the_data_are_read_and_hours_afterwards():
    assert words(on_gpus()) == (Reason.VALID, "plan: 1 pod × 8 GPUs, ZeRO-3; about 48 GB per GPU")
    reason, text = words(on_gpus(), ALPACA)
    assert reason == Reason.VALID
    assert text.startswith("plan: 1 pod × 8 GPUs, ZeRO-3; about 48 GB per GPU, ")
    assert text.endswith(" h")


def test_hours_of_given_steps_are_a_bound_until_the_data_are_read():
    spec = on_gpus(training={"maxSteps": 1000})
    assert ", at most " in words(spec)[1]
    assert ", at most " not in words(spec, ALPACA)[1]
    bound, found = (status_estimate(spec, estimate_of(spec, data)) for data in (None, ALPACA))
    assert bound is not None
    assert found is not None
    assert (bound.hours_at_most, found.hours_at_most) == (True, None)
    assert (bound.hours or 0) > (found.hours or 0) > 0


def test_what_will_not_fit_is_accepted_with_what_to_change():
    reason, text = words(on_gpus(deepspeed={"stage": 2}))
    assert reason == Reason.UNLIKELY_TO_FIT
    assert text == (
        "plan: 1 pod × 8 GPUs, ZeRO-2; warning: about 112 GB per GPU, but an L20 has 48 GB: "
        "set deepspeed.stage to 3 (about 32 GB)"
    )


def test_the_change_that_is_advised_makes_it_fit():
    assert words(on_gpus(deepspeed={"stage": 3}))[0] == Reason.VALID


def test_a_gpu_that_is_not_named_or_not_known_gets_no_verdict():
    for product in (None, "Radeon-X"):
        spec = on_gpus(product, deepspeed={"stage": 2})
        assert gpu_of(spec) is None
        assert words(spec, ALPACA) == (
            Reason.VALID,
            "plan: 1 pod × 8 GPUs, ZeRO-2; about 112 GB per GPU",
        )
        found = status_estimate(spec, estimate_of(spec, ALPACA))
        assert found is not None
        assert found.to_api() == {"memoryPerGpu": "112G"}
    assert gpu_of(on_gpus()) == GPUS["L20"]


@pytest.mark.parametrize("spec", [spec_of(), spec_of(model={"size": "2B"}), on_gpus(size="custom")])
def test_custom_models_and_cpus_have_no_estimate(spec):
    assert estimate_of(spec, ALPACA) is None
    assert status_estimate(spec, None) is None
    assert words(spec, ALPACA)[1].startswith("plan: ")
    assert "about" not in words(spec, ALPACA)[1]


def test_the_status_has_the_numbers():
    spec = on_gpus("NVIDIA-A100-SXM4-80GB", deepspeed={"stage": 3, "offload": "parameters"})
    found = status_estimate(spec, estimate_of(spec, ALPACA))
    assert found is not None
    assert set(found.to_api()) == {"gpu", "memoryPerGpu", "hostMemoryPerGpu", "hours", "fits"}
    assert (found.gpu, found.fits) == ("A100-80", True)


def test_padding_takes_longer_than_packing():
    hours = [
        found.hours
        for packing in (True, False)
        if (found := estimate_of(on_gpus(training={"packing": packing}), ALPACA)) is not None
    ]
    assert hours[0] is not None
    assert hours[1] is not None
    assert hours[0] < hours[1]


def test_the_data_are_known_from_the_trainer_and_remembered():
    progress = progress_of("alpaca", samples=10, tokens=500)
    assert PreparedData.known(FineTuneStatus(), progress) == PreparedData(10, 500)
    assert PreparedData.known(FineTuneStatus(samples=10, tokens=500), None) == PreparedData(10, 500)
    assert PreparedData.known(FineTuneStatus(), progress_of("alpaca")) is None
    assert PreparedData.known(FineTuneStatus(samples=10), None) is None


def test_a_warning_is_an_event_of_its_own():
    now = START + timedelta(seconds=60)
    reason, text = words(on_gpus(deepspeed={"stage": 2}))
    warned = Finding("uid", 1, Ledger(), World(), Verdict(CONDITION_ACCEPTED, "True", reason, text))
    before = compose(spec_of(), FineTuneStatus(), replace(warned, acceptance=accepted()), now)
    after = compose(spec_of(), before, warned, now)
    told = condition_events(before.conditions, after.conditions)
    assert [(event.type, event.reason, event.note) for event in told] == [("Warning", "UnlikelyToFit", text)]


def test_the_estimate_of_a_run_that_has_ended_stays():
    spec = on_gpus()
    known = status_estimate(spec, estimate_of(spec, ALPACA))
    ledger = Ledger(number=1, ending=Ending(True, Reason.SUCCEEDED, "trained"))
    finding = Finding("uid", 1, ledger, World(), accepted(), estimate=known)
    ended = compose(spec, FineTuneStatus(), finding, START)
    assert ended.estimate == known
    assert compose(spec, ended, replace(finding, estimate=None), START) == ended


@pytest.mark.parametrize(("size", "text"), [(3.94e9, "3.9G"), (44.4e9, "44G"), (9.96e9, "10G")])
def test_memory_is_a_quantity_that_people_read(size, text):
    assert decimal_gigabytes(size) == text
