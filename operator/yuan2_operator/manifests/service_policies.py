"""What keeps a service's pods apart, alive and to themselves: spread, budgets, network policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from yuan2_core.contract import PORT_CONTROLLER, PORT_WORKER
from yuan2_operator.constants import (
    COMPONENT_API,
    COMPONENT_CONTROLLER,
    COMPONENT_WEB,
    COMPONENT_WORKER,
    LABEL_COMPONENT,
)
from yuan2_operator.manifests.common import Manifest, metadata, passthrough
from yuan2_operator.plan.owner import Owner, selector_labels
from yuan2_operator.plan.service import ServicePlan, component_name

CALLERS = {
    COMPONENT_CONTROLLER: (COMPONENT_WORKER, COMPONENT_API, COMPONENT_WEB),
    COMPONENT_WORKER: (COMPONENT_API, COMPONENT_WEB, COMPONENT_CONTROLLER),
}
"""Who asks whom. FastChat's page asks workers itself, and its controller asks them for their status."""
_PORTS = {COMPONENT_CONTROLLER: PORT_CONTROLLER, COMPONENT_WORKER: PORT_WORKER}


def policies(plan: ServicePlan) -> list[Manifest]:
    """The PodDisruptionBudgets of API and workers, and the NetworkPolicies of what asks for no key."""
    budgets = [disruption_budget(plan.owner, component) for component in (COMPONENT_WORKER, COMPONENT_API)]
    if not plan.spec.network_policy.enabled:
        return budgets
    others = [passthrough(peer) for peer in plan.spec.network_policy.allow_from]
    return [*budgets, *(network_policy(plan.owner, component, others) for component in CALLERS)]


def disruption_budget(owner: Owner, component: str) -> Manifest:
    """Nodes are drained one pod of the component after the other; a single pod does not hold a drain up."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(owner, component_name(owner.name, component), component),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector_labels(owner, component)}},
    }


def network_policy(owner: Owner, component: str, others: Sequence[Manifest] = ()) -> Manifest:
    """Only the service's own pods that need it reach the component, and `others`."""
    labels = selector_labels(owner, component)
    own = {label: value for label, value in labels.items() if label != LABEL_COMPONENT}
    callers: Manifest = {
        "matchLabels": own,
        "matchExpressions": [{"key": LABEL_COMPONENT, "operator": "In", "values": list(CALLERS[component])}],
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(owner, component_name(owner.name, component), component),
        "spec": {
            "podSelector": {"matchLabels": labels},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": callers}, *others],
                    "ports": [{"port": _PORTS[component], "protocol": "TCP"}],
                }
            ],
        },
    }


def spread(owner: Owner, component: str) -> dict[str, Any]:
    """The pods of a component go to different nodes where there are some."""
    constraint = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector_labels(owner, component)},
    }
    return {"topologySpreadConstraints": [constraint]}
