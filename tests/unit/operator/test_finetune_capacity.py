"""How much room the nodes have for pods that wait, in words."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tests.support.attempts import spec_of
from yuan2_operator.plan.capacity import Demand, demand, room

GPU = "nvidia.com/gpu"
WANTED = Demand(2, GPU, Decimal(8), {})


def node(name: str, gpus: int, labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    allocatable = {"cpu": "64", GPU: str(gpus)} if gpus else {"cpu": "64"}
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": spec,
        "status": {"allocatable": allocatable},
    }


def pod(where: str, *gpus: int) -> dict[str, Any]:
    containers = [{"resources": {"limits": {GPU: str(count)}}} for count in gpus]
    return {"spec": {"nodeName": where, "containers": [*containers, {}]}}


def test_what_other_pods_hold_is_not_free():
    nodes = [node("a", 8), node("b", 8), node("c", 8)]
    held = [pod("b", 1, 1), pod("c", 4)]
    assert room(WANTED, nodes, held) == "1 of 3 nodes has 8 nvidia.com/gpu free, 2 are needed; the next has 6"
    assert room(WANTED, nodes, []) == "3 of 3 nodes have 8 nvidia.com/gpu free, 2 are needed"


def test_nodes_without_room_or_that_may_not_be_used_are_told_apart():
    assert room(WANTED, [], []) == "none of 0 nodes has 8 nvidia.com/gpu free, 2 are needed"
    full = [node("a", 0), node("b", 8, unschedulable=True)]
    one = Demand(1, GPU, Decimal(8), {})
    assert room(one, full, []) == "none of 1 node has 8 nvidia.com/gpu free, 1 is needed; the next has 0"
    chosen = Demand(2, GPU, Decimal(8), {"gpu": "H100"})
    nodes = [node("a", 8, {"gpu": "H100"}), node("b", 8, {"gpu": "L20"}), node("c", 8)]
    assert room(chosen, nodes, []) == "1 of 1 node has 8 nvidia.com/gpu free, 2 are needed"


def test_a_node_that_is_overfull_has_nothing_free():
    text = room(WANTED, [node("a", 4)], [pod("a", 8)])
    assert text == "none of 1 node has 8 nvidia.com/gpu free, 2 are needed; the next has 0"


def test_gpus_decide_and_without_them_cpus():
    workers = {"replicas": 3, "processesPerWorker": None, "gpusPerWorker": 4, "nodeSelector": {"a": "b"}}
    assert demand(spec_of(workers=workers)) == Demand(3, GPU, Decimal(4), {"a": "b"})
    assert demand(spec_of()) == Demand(2, "cpu", Decimal(1), {})
    limit = {"resources": {"requests": None, "limits": {"cpu": "1500m"}}}
    wanted = demand(spec_of(workers=limit))
    assert wanted == Demand(2, "cpu", Decimal("1.5"), {})
    assert room(wanted, [node("a", 0)], []) == "1 of 1 node has 1.5 cpu free, 2 are needed"
    assert demand(spec_of(workers={"resources": {"requests": None}})) is None
