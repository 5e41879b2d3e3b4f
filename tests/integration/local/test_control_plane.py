"""A control plane without a node: what integration tests build on, and that it leaves nothing behind."""

from __future__ import annotations

import os

import pytest

from tests.support.cluster import TestCluster
from yuan2_local import cluster
from yuan2_local.errors import ClusterError
from yuan2_local.paths import cache_from, control_plane_state
from yuan2_local.processes import Processes, alive

pytestmark = pytest.mark.cluster


def test_namespaces_are_ready_for_pods(control_plane: TestCluster) -> None:
    account = control_plane.kubectl("get", "serviceaccount", "default", "-n", "default", "-o", "name")
    assert account == "serviceaccount/default\n"


def test_strangers_are_refused(control_plane: TestCluster) -> None:
    with pytest.raises(ClusterError, match="no"):
        control_plane.kubectl("auth", "can-i", "list", "pods", "--as=nobody")
    with pytest.raises(ClusterError, match="Forbidden"):
        control_plane.kubectl("get", "pods", "--as=nobody")


def test_a_refusal_carries_the_api_servers_sentence(control_plane: TestCluster) -> None:
    with pytest.raises(ClusterError, match='namespaces "absent" not found'):
        control_plane.kubectl("get", "namespace", "absent")


def test_up_again_starts_nothing_and_heals_what_died(control_plane: TestCluster) -> None:
    processes = Processes(control_plane.state)
    before = processes.records()
    cluster.up(control_plane.cache, control_plane.state, with_node=False)
    assert processes.records() == before
    processes.stop("kube-controller-manager")
    cluster.up(control_plane.cache, control_plane.state, with_node=False)
    after = processes.records()
    assert after["kube-controller-manager"].pid != before["kube-controller-manager"].pid
    assert after["kube-apiserver"] == before["kube-apiserver"]


def test_two_run_side_by_side_and_one_leaves_no_trace(control_plane: TestCluster) -> None:
    state = control_plane_state(cache_from(os.environ), f"second-{os.getpid()}")
    cluster.up(control_plane.cache, state, with_node=False)
    records = Processes(state).records()
    cluster.down(control_plane.cache, state)
    assert not any(alive(record) for record in records.values())
    assert not state.root.exists()
    assert control_plane.kubectl("get", "--raw", "/readyz") == "ok"


def test_a_start_that_is_interrupted_leaves_no_trace(
    control_plane: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = control_plane_state(cache_from(os.environ), f"failing-{os.getpid()}")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "apply_objects", fail)
    with pytest.raises(KeyboardInterrupt):
        cluster.up(control_plane.cache, state, with_node=False)
    assert not state.root.exists()
