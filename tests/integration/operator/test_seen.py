"""What an administrator sees of the real operator: metrics, readiness, log lines."""

from __future__ import annotations

import json
import time
import urllib.error
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.operator.finetune_bench import bench
from tests.support.operator_process import Operator, instead_of
from tests.support.waiting import wait_for

pytestmark = pytest.mark.cluster

GPUS = {"workers": {"processesPerWorker": None, "gpusPerWorker": 2}}


def samples(operator: Operator, name: str, **labels: str) -> dict[tuple[str, ...], float]:
    """Values of a metric whose labels include those; by the other labels' values."""
    return {
        tuple(value for key, value in sorted(sample.labels.items()) if key not in labels): sample.value
        for family in text_string_to_metric_families(operator.ask("/metrics"))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def ready(operator: Operator) -> bool:
    try:
        return operator.ask("/readyz") == "ok\n"
    except urllib.error.HTTPError:
        return False


def test_a_run_is_seen_from_its_start_to_its_end(control_plane, operator, node, tmp_path):
    settings = {"YUAN2_LOG_FORMAT": "json", "YUAN2_METRICS_LABEL": "team"}
    with (
        instead_of(operator, tmp_path, settings) as [seen],
        bench(control_plane, operator, node) as run,
    ):
        wait_for("readiness", lambda: ready(seen))
        run.create(**GPUS)
        run.cluster.client.merge(f"{run.root}/{run.name}", {"metadata": {"labels": {"team": "red"}}})
        run.run()
        run.says(40)
        here = {"namespace": run.namespace}
        wait_for("the step", lambda: samples(seen, "yuan2_finetune_step", **here) == {("alpaca",): 40})
        assert samples(seen, "yuan2_finetune_tokens_per_second", **here) == {("alpaca",): 1234.56}
        wait_for("the phase", lambda: samples(seen, "yuan2_finetunes", **here) == {("Running",): 1})
        for pod in run.pods():
            run.node.end(pod, 1, "boom")
        run.run(attempt=2)
        assert samples(seen, "yuan2_finetune_restarts_total", **here) == {("Crashed",): 1}
        for pod in run.pods(2):
            run.node.end(pod, 0, run.termination("Complete", "trained to the end", step=100))
        run.wait_condition("Complete", "True")
        assert samples(seen, "yuan2_finetune_gpu_seconds_total", **here)[("red",)] > 0
        wait_for("the end of its series", lambda: not samples(seen, "yuan2_finetune_step", **here))
        entries = [json.loads(line) for line in seen.text().splitlines() if line.startswith("{")]
        about = [entry for entry in entries if entry.get("namespace") == run.namespace]
        assert {"alpaca"} == {entry["name"] for entry in about}
        assert {1, 2} <= {entry.get("attempt") for entry in about}


def test_readiness_waits_for_the_caches(control_plane, operator, node, tmp_path):
    with bench(control_plane, operator, node) as run:
        run.create()
        run.run()
        wait_for("the phase", lambda: run.status.get("phase") == "Running")
        with instead_of(operator, tmp_path, {}) as [seen]:
            while not ready(seen):
                time.sleep(0.005)
            assert samples(seen, "yuan2_finetunes", namespace=run.namespace) == {("Running",): 1}


def test_the_service_has_a_port_that_answers_in_every_pod(control_plane, operator, node: Any):
    """A scrape of the run's Service would find the other ranks down: only rank 0 serves progress."""
    with bench(control_plane, operator, node) as run:
        run.create()
        run.run()
        [service] = run.objects("services").values()
        assert [port["name"] for port in service["spec"]["ports"]] == ["pytorchjob-port"]
        monitored = run.node.pods(
            run.namespace, "yuan2.dev/component=trainer,batch.kubernetes.io/job-completion-index=0"
        )
        assert [pod["metadata"]["name"] for pod in monitored] == [run.pods()[0]["metadata"]["name"]]
