"""`make bench-path`: the whole path in numbers, measured on the example as a user runs it.

The images are present before anything is timed. A running cluster is used; otherwise one is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.report import Report, Row, at_most, options, plain
from tests.support.cluster import TestCluster, running_node
from tests.support.journey import Namespace, apply_example, example_manifest, install_operator, namespace
from yuan2_core.contract import PORT_PROGRESS
from yuan2_demo import install
from yuan2_local.paths import cache_from, node_state

TRAINING_SECONDS = 1200.0
SERVICE_SECONDS = 300.0
REST_SECONDS = 30.0
METRICS_PORT = 8080
API_CALLS = 20
OPERATOR_MEGABYTES = 90.0


def operator_metrics(made: TestCluster) -> dict[str, float]:
    """`api_calls` so far and `memory` (MB) of the operator, from its own /metrics."""
    words = (
        "-n",
        install.OPERATOR_NAMESPACE,
        "get",
        "pods",
        "-l",
        f"app.kubernetes.io/name={install.OPERATOR}",
    )
    address = made.kubectl(
        *words, "--field-selector=status.phase=Running", "-o", "jsonpath={.items[0].status.podIP}"
    )
    text = httpx.get(f"http://{address}:{METRICS_PORT}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    requests = [sample for sample in samples if sample.name == "yuan2_operator_api_requests_total"]
    # The Lease of the replicas is renewed however many resources there are.
    calls = sum(sample.value for sample in requests if sample.labels.get("resource") != "leases")
    memory = next(sample.value for sample in samples if sample.name == "process_resident_memory_bytes")
    return {"api_calls": calls, "memory": memory / 1e6}


def first_step_seconds(made: Namespace, applied: float) -> float:
    """Seconds until rank 0 says that an optimizer step is done, asked of the pod itself."""
    while time.monotonic() - applied < TRAINING_SECONDS:
        pods = made.list("pods", "yuan2.dev/finetune=identity")
        address = next(
            (pod["status"].get("podIP") for pod in pods if "-1-0-" in pod["metadata"]["name"]), None
        )
        while address and time.monotonic() - applied < TRAINING_SECONDS:
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                answer = httpx.get(f"http://{address}:{PORT_PROGRESS}/progress", timeout=2, trust_env=False)
                if answer.json()["step"] >= 1:
                    return time.monotonic() - applied
            time.sleep(0.1)
        time.sleep(0.2)
    raise AssertionError(made.explain("y2ft"))


def last_word(made: Namespace) -> dict[str, Any]:
    """The progress that rank 0's pod left in its termination message."""
    pods = made.list("pods", "yuan2.dev/finetune=identity")
    pod = next(pod for pod in pods if "-1-0-" in pod["metadata"]["name"])
    message = pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"]
    return dict(json.loads(message)["progress"])


def measure(operated: TestCluster) -> list[Row]:
    """The example from `kubectl apply` to an answer, and what the operator spends on it."""
    with namespace(operated, "bench-path") as made:
        apply_example(made)
        time.sleep(REST_SECONDS)
        rest = _memory(operated)
        before = operator_metrics(operated)["api_calls"]
        applied = time.monotonic()
        made.apply(example_manifest("finetune"))
        first_step = first_step_seconds(made, applied)
        made.wait("y2ft/identity", "Complete", TRAINING_SECONDS)
        time.sleep(2.0)  # the events that follow the last status count too
        calls = operator_metrics(operated)["api_calls"] - before
        run = last_word(made)
        applied = time.monotonic()
        made.apply(example_manifest("service"))
        made.wait("y2svc/identity", "Ready", SERVICE_SECONDS)
        ready = time.monotonic() - applied
        time.sleep(REST_SECONDS)
        after = _memory(operated)
    sizes = f"example `identity`, 2 pods, {run['secondsTotal']:.0f} s"
    outside = 100 * (1 - run["secondsInSteps"] / run["secondsTotal"])
    return [
        plain("`kubectl apply` of the Yuan2FineTune to the first optimizer step", first_step, "s", sizes),
        plain("`kubectl apply` of the Yuan2Service to Ready", ready, "s", "example `identity`"),
        at_most(plain("API calls of the operator, creation to Complete", calls, "calls", sizes), API_CALLS),
        plain("memory of the operator before it has handled anything", rest, "MB", "no FineTune, no Service"),
        at_most(
            plain("memory of the operator after work", after, "MB", "1 FineTune and 1 Service handled"),
            OPERATOR_MEGABYTES,
        ),
        plain("tokens/s of the training", run["tokensPerSecond"], "tokens/s", sizes),
        plain("wall time outside optimizer steps", outside, "%", sizes),
    ]


def _memory(operated: TestCluster) -> float:
    return statistics.median(operator_metrics(operated)["memory"] for _ in range(3))


def main() -> None:
    """Measure and write build/bench/path.json."""
    report = Report("path", options(__doc__, small=False).parse_args())
    with running_node(cache_from(os.environ), node_state(os.environ)) as made:
        install_operator(made)
        report.write(measure(made))


if __name__ == "__main__":
    main()
