"""How much room the nodes have for pods that wait. Pure: nodes and pods are the API server's dicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.plan.pod_template import node_selector
from yuan2_operator.plan.quantity import parse_quantity

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Demand:
    """What each pod of a run asks of a node, in the resource that decides where it can run."""

    pods: int
    resource: str
    amount: Decimal
    node_selector: Mapping[str, str]


def demand(spec: FineTuneSpec) -> Demand | None:
    """GPUs or, without them, CPUs; None for pods that ask for neither."""
    workers = spec.workers
    labels = node_selector(workers.node_selector, workers.pod_template)
    if workers.gpus_per_worker is not None:
        return Demand(workers.replicas, workers.gpu_resource, Decimal(workers.gpus_per_worker), labels)
    cpu = workers.resources.requests.get("cpu") or workers.resources.limits.get("cpu")
    return None if cpu is None else Demand(workers.replicas, "cpu", parse_quantity(cpu), labels)


def room(wanted: Demand, nodes: Iterable[Object], pods: Iterable[Object]) -> str:
    """How many nodes could take a pod now, and what the fullest of the others has free.

    Args:
        wanted: what a pod asks for.
        nodes: all nodes.
        pods: those that hold a part of a node: on one, and not ended.
    """
    used: dict[str, Decimal] = defaultdict(Decimal)
    for pod in pods:
        used[pod["spec"].get("nodeName", "")] += _requested(pod, wanted.resource)
    free = sorted(
        (
            _allocatable(node, wanted.resource) - used[node["metadata"]["name"]]
            for node in nodes
            if _may(node, wanted)
        ),
        reverse=True,
    )
    unit = f"{_number(wanted.amount)} {wanted.resource}"
    count = sum(amount >= wanted.amount for amount in free)
    of = f"{count or 'none'} of {len(free)} node{'' if len(free) == 1 else 's'}"
    text = f"{of} {'has' if count < 2 else 'have'} {unit} free, {wanted.pods} {_is(wanted.pods)} needed"
    rest = free[count:]
    return f"{text}; the next has {_number(max(rest[0], Decimal(0)))}" if rest else text


def _may(node: Object, wanted: Demand) -> bool:
    labels = node["metadata"].get("labels", {})
    fits = all(labels.get(key) == value for key, value in wanted.node_selector.items())
    return fits and not node.get("spec", {}).get("unschedulable", False)


def _allocatable(node: Object, resource: str) -> Decimal:
    return parse_quantity(node.get("status", {}).get("allocatable", {}).get(resource, 0))


def _requested(pod: Object, resource: str) -> Decimal:
    total = Decimal(0)
    for container in pod["spec"].get("containers", ()):
        resources = container.get("resources", {})
        given = {**resources.get("limits", {}), **resources.get("requests", {})}
        total += parse_quantity(given.get(resource, 0))
    return total


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _number(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
