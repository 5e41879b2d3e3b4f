"""The life of `make demo`: Ctrl-C, again to the end, `make demo-down`, and the machine is as it was before.

`make test` runs the tests that are not marked `long`, `make e2e-lifecycle` all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.demo import (
    CACHE,
    STATE,
    STEPS,
    demo,
    empty_machine,
    example_is_there,
    interrupt_in,
    kubectl,
    machine,
    succeed,
    take_down,
)
from yuan2_local import cluster, registry

pytestmark = [pytest.mark.node, pytest.mark.timeout(3600)]
TRAINING = 5


@pytest.fixture
def untouched() -> Iterator[dict[str, Any]]:
    """The machine before."""
    with empty_machine() as before:
        yield before


def test_after_ctrl_c_it_runs_through_and_down_leaves_no_trace(untouched: dict[str, Any]) -> None:
    interrupt_in(TRAINING)
    assert "cluster: a one-node Kubernetes" in succeed()
    assert example_is_there()
    take_down()
    assert machine() == untouched
    take_down()
    assert machine() == untouched


@pytest.mark.long
def test_ctrl_c_in_any_step_leaves_nothing_half_done(untouched: dict[str, Any]) -> None:
    interrupt_in(1)
    assert machine() == untouched
    for step in range(2, STEPS + 1):
        interrupt_in(step)
    succeed()
    take_down()
    assert machine() == untouched


@pytest.mark.long
def test_a_cluster_that_kubeconfig_names_is_used_and_stays(untouched: dict[str, Any], tmp_path: Path) -> None:
    cluster.up(CACHE, STATE, with_node=True)
    ours = kubectl("get", "crds,namespaces,clusterroles,clusterrolebindings", "-o", "name")
    kubeconfig = tmp_path / "kubeconfig"
    shutil.copy(STATE.kubeconfig, kubeconfig)
    foreign = {"KUBECONFIG": str(kubeconfig), "REGISTRY": f"{registry.ensure_registry(CACHE)}/outside"}
    said = succeed(**foreign)
    assert "cluster: KUBECONFIG" in said
    assert foreign["REGISTRY"] in said
    take_down(**foreign)
    kubectl("wait", "--for=delete", "namespace/yuan2-demo", "namespace/yuan2-system", "--timeout=120s")
    assert kubectl("get", "crds,namespaces,clusterroles,clusterrolebindings", "-o", "name") == ours
    assert demo("down", **foreign).end() == 0
    assert cluster.load(STATE) is not None
    cluster.down(CACHE, STATE)
    assert machine() == untouched
