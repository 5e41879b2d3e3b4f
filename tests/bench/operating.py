"""`make bench-operator`: what the operator asks of the API server in a long run, its memory after work, and
many runs at once (`tests.bench.fleet`).

Requests of a run are counted by a simulated clock (`tests.bench.simulated`). Memory is that of the operator
as a process of its own on a real control plane, where nodes are played, so that many FineTunes can come,
train, end and go in minutes. Needs Go for the control plane, and neither root nor a node.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil

from tests.bench import fleet
from tests.bench.report import Report, Row, at_most, options, plain
from tests.bench.simulated import Run, Simulation
from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.cluster import TestCluster, running_control_plane
from tests.support.kubelet import FakeNode
from tests.support.operator_process import Operator, service_account_kubeconfig
from tests.support.waiting import wait_for

RUNS = (Run(50, 20, 2), Run(5 * 3600, 1500, 10), Run(47 * 3600, 406, 1))
"""The demo's, one of five hours, and the published one of 102B."""
FINETUNES = 100
REST_SECONDS = 15.0
CALLS_A_RUN = 15
"""And one a minute."""
MEGABYTES = 90.0


def main() -> None:
    """Measure and write build/bench/operator.json."""
    arguments = options(__doc__).parse_args()
    report = Report("operator", arguments)
    sizes = fleet.SMALL if arguments.small else fleet.FULL
    with running_control_plane(f"bench-{os.getpid()}") as made, tempfile.TemporaryDirectory() as name:
        if arguments.small:
            rows = measure(made, Path(name), RUNS[:1], finetunes=2, rest=1.0)
        else:
            rows = measure(made, Path(name))
    # With a cluster of its own, whose controllers are started otherwise.
    with running_control_plane(f"fleet-{os.getpid()}") as made, tempfile.TemporaryDirectory() as name:
        rows += fleet.measure(made, Path(name), sizes)
    report.write(rows)


def measure(
    cluster: TestCluster,
    root: Path,
    runs: tuple[Run, ...] = RUNS,
    finetunes: int = FINETUNES,
    rest: float = REST_SECONDS,
) -> list[Row]:
    """Requests of the runs, and memory before, with and after so many FineTunes."""
    return [*(_requests(run) for run in runs), *_memory(cluster, root, finetunes, rest)]


def _requests(run: Run) -> Row:
    made = Simulation(run).go()
    count = sum(made.requests.values())
    sizes = f"simulated clock, {run}; {made.requests['status']} writes of the status"
    limit = CALLS_A_RUN + run.end // 60
    return at_most(plain("requests to the API server, creation to Complete", count, "requests", sizes), limit)


def _memory(cluster: TestCluster, root: Path, finetunes: int, rest: float) -> list[Row]:
    with _operator(cluster, root) as operator, FakeNode(cluster.client).up() as node:
        time.sleep(rest)
        found = [_megabytes(operator)]
        with bench(cluster, operator, node) as made:
            for number in range(finetunes):
                _whole_life(replace(made, name=f"run-{number}"))
            time.sleep(rest)
            found.append(_megabytes(operator))
            _remove_all(made)
        time.sleep(rest)
        found.append(_megabytes(operator))
    done = f"{finetunes} FineTunes trained to the end"
    before, kept, after = (
        plain(f"memory of the operator {when}", megabytes, "MB", sizes)
        for (when, sizes), megabytes in zip(
            (
                ("at the start", "no FineTune"),
                ("after work", f"{done}, all kept"),
                ("when they are gone", done),
            ),
            found,
            strict=True,
        )
    )
    return [before, at_most(kept, MEGABYTES), after]


@contextlib.contextmanager
def _operator(cluster: TestCluster, root: Path) -> Iterator[Operator]:
    with Operator(service_account_kubeconfig(cluster, root), root / "operator.log").running() as made:
        yield made


def _whole_life(run: Bench) -> None:
    """One FineTune of two pods from its creation to Complete."""
    run.says(0)
    run.create()
    run.run()
    for step in (1, 50, 99):
        run.says(step)
        wait_for("a look at the progress", lambda asked=run.trainer.asked: run.trainer.asked > asked + 1)
    message = run.termination("Complete", "trained to the end", step=100)
    for pod in run.pods():
        run.node.end(pod, 0, message)
    run.wait_condition("Complete", "True")


def _remove_all(run: Bench) -> None:
    for body in run.cluster.client.get(run.root)["items"]:
        run.cluster.client.delete(f"{run.root}/{body['metadata']['name']}")
    for pod in run.node.pods(run.namespace):
        run.node.confirm_deletion(pod)
    wait_for("no FineTune", lambda: not run.cluster.client.get(run.root)["items"])
    wait_for("no pod", lambda: not run.node.pods(run.namespace), 60)


def _megabytes(operator: Operator) -> float:
    assert operator.process is not None
    return float(psutil.Process(operator.process.pid).memory_info().rss / 1e6)


if __name__ == "__main__":
    main()
