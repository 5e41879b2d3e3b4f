"""Two operators: one works, the other takes over; and what two would do that both believe to lead."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.operator.finetune_bench import Bench, bench
from tests.support.operator_process import instead_of
from tests.support.waiting import wait_for
from yuan2_local.client import ApiError

pytestmark = pytest.mark.cluster

LEASE = "/apis/coordination.k8s.io/v1/namespaces/yuan2-system/leases/yuan2-operator"


def holder(cluster: Any) -> str:
    try:
        return str(cluster.client.get(LEASE)["spec"].get("holderIdentity", ""))
    except ApiError:
        return ""


def finish(run: Bench) -> None:
    for pod in run.pods():
        run.node.end(pod, 0, run.termination("Complete", "trained to the end", step=100))
    run.wait_condition("Complete", "True")
    assert sorted(run.jobs()) == ["alpaca-1"]
    status = run.status
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]
    assert (status["restarts"], status["disruptions"]) == (0, 0)


def test_the_other_takes_over_when_the_leader_is_killed(control_plane, operator, node, tmp_path):
    with (
        instead_of(operator, tmp_path, {"YUAN2_LEASE_NAMESPACE": "yuan2-system"}, count=2) as both,
        bench(control_plane, operator, node) as run,
    ):
        first = wait_for("a leader", lambda: holder(control_plane))
        leader = next(one for one in both if first.endswith(f"-{one.process.pid}"))
        other = next(one for one in both if one is not leader)
        run.create()
        run.run()
        # It looks, once at its start, whether there is anything; it writes nothing.
        assert {verb for verb, resource in other.api_requests() if resource != "leases"} <= {"list"}
        # Its caches are filled, but what both told would be counted twice.
        assert other.ask("/readyz") == "ok\n"
        assert "yuan2_finetunes{" in leader.ask("/metrics")
        assert "yuan2_finetunes{" not in other.ask("/metrics")
        leader.kill()
        run.says(40, last_checkpoint_step=40)
        second = wait_for("another leader", lambda: holder(control_plane) not in ("", first), 60)
        assert second
        wait_for("its status", lambda: run.status.get("lastCheckpointStep") == 40, 60)
        finish(run)
        # It ends normally, and gives the Lease back.
        assert other.stop() == 0
        assert holder(control_plane) == ""


def test_two_that_both_work_do_no_harm(control_plane, operator, node, tmp_path):
    """As when a leader hangs, loses its Lease, and goes on."""
    with instead_of(operator, tmp_path, {}, count=2), bench(control_plane, operator, node) as run:
        run.create()
        run.run()
        for step in (10, 30, 50, 70, 90):
            run.says(step)
            wait_for("a look", lambda asked=run.trainer.asked: run.trainer.asked > asked + 3)
        finish(run)
