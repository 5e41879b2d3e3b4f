"""What is counted of runs, and that no user can make more series than there should be."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from prometheus_client import REGISTRY

from tests.support.finetunes import progress_of
from yuan2_operator.api.finetune import Attempt
from yuan2_operator.cache import Cache
from yuan2_operator.client import FINETUNES, YUAN_SERVICES
from yuan2_operator.handlers.fleet import RUNS_SHOWN, Fleet
from yuan2_operator.queue import Key
from yuan2_operator.reconcile.accounting import OTHER, VALUES_SHOWN, GpuMeter, count_endings

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def attempt(number: int, outcome: str | None = None, reason: str = "", counted: bool = False) -> Attempt:
    return Attempt(number=number, outcome=outcome, reason=reason, counted=counted)


def test_an_attempt_is_counted_once_when_it_ends():
    crashed, preempted = attempt(1, "Failed", "Crashed", counted=True), attempt(2, "Disrupted", "Preempted")
    before, after = [attempt(1)], [crashed, preempted, attempt(3)]
    count_endings("count", before, after)
    count_endings("count", after, after)
    assert value("yuan2_finetune_restarts_total", namespace="count", reason="Crashed") == 1
    assert value("yuan2_finetune_disruptions_total", namespace="count", reason="Preempted") == 1
    count_endings("count", after, [*after[:2], attempt(3, "Succeeded")])
    assert value("yuan2_finetune_restarts_total", namespace="count", reason="Succeeded") == 0


def test_gpu_time_is_what_pods_hold_between_two_readings():
    meter, key = GpuMeter("team"), Key("Yuan2FineTune", "gpus", "alpaca")
    for seconds, gpus in ((0, 16), (10, 16), (20, 0), (50, 8), (60, 0), (99, 0)):
        meter.read(key, {"team": "a"}, gpus, NOW + timedelta(seconds=seconds))
    assert value("yuan2_finetune_gpu_seconds_total", namespace="gpus", label="a") == 16 * 20 + 8 * 10


def test_values_of_the_label_are_bounded():
    meter = GpuMeter("team")
    for number in range(VALUES_SHOWN + 20):
        key = Key("Yuan2FineTune", "many", f"run-{number}")
        meter.read(key, {"team": f"t{number}"}, 1, NOW)
        meter.read(key, {"team": f"t{number}"}, 0, NOW + timedelta(seconds=1))
    assert value("yuan2_finetune_gpu_seconds_total", namespace="many", label=OTHER) == 20


def fleet(count: int) -> dict[str, list]:
    keys = [Key("Yuan2FineTune", "demo", f"run-{number}") for number in range(count)]
    phases = ("Running", "Complete", None)
    bodies = {
        key: [
            {
                "metadata": {"name": key.name, "uid": key.name},
                "status": {"phase": phases[number % 3]} if phases[number % 3] else {},
            }
        ]
        for number, key in enumerate(keys)
    }
    cache = Cache({FINETUNES.plural: bodies, YUAN_SERVICES.plural: {}})
    made = Fleet(lambda: cache, lambda: [(key, progress_of(key.name, step=7)) for key in keys])
    return {family.name: family.samples for family in made.collect()}


def test_resources_are_counted_by_phase():
    samples = fleet(7)["yuan2_finetunes"]
    assert {(s.labels["phase"], s.value) for s in samples} == {
        ("Running", 3),
        ("Complete", 2),
        ("Pending", 2),
    }


def test_progress_has_a_bounded_number_of_series():
    families = fleet(RUNS_SHOWN + 5)
    for name in ("step", "total_steps", "loss", "tokens_per_second"):
        assert len(families[f"yuan2_finetune_{name}"]) == RUNS_SHOWN
    assert families["yuan2_finetune_step"][0].value == 7


def test_without_a_cache_there_are_no_series():
    assert all(not family.samples for family in Fleet(lambda: None, list).collect())
