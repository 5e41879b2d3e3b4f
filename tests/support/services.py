"""Builders of Yuan2Service parts: the least that is valid, changed by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from yuan2_operator.api.finetune import FineTuneStatus
from yuan2_operator.api.service import ServiceSpec, ServiceStatus
from yuan2_operator.constants import KIND_SERVICE
from yuan2_operator.manifests.service import service_manifests
from yuan2_operator.plan.owner import Owner, selector_labels
from yuan2_operator.plan.service import ServicePlan, plan_service

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
OWNER = Owner(kind=KIND_SERVICE, name="alpaca", namespace="demo", uid="uid-1", generation=3)
IMAGE = "registry.example/yuan2/serve:1"
VLLM_IMAGE = "registry.example/yuan2/serve-vllm:1"
SOURCE = {"persistentVolumeClaim": {"claimName": "models", "path": "yuan2-2b"}}


def spec_of(**sections: Any) -> ServiceSpec:
    """A spec that serves a directory of a claim; `sections` replace top-level fields."""
    body: dict[str, Any] = {"model": {"name": "yuan2", "source": SOURCE}}
    return ServiceSpec.model_validate({**body, **sections})


def finetune_of(**fields: Any) -> FineTuneStatus:
    """The status of a FineTune that is complete; `fields` replace its fields."""
    model = {"claimName": "outputs", "path": "alpaca/model", "fingerprint": "run-1"}
    return FineTuneStatus.model_validate({"phase": "Complete", "model": model, **fields})


def plan_of(spec: ServiceSpec | None = None, **changes: Any) -> ServicePlan:
    """The plan of a spec whose references all exist."""
    arguments: dict[str, Any] = {
        "finetune": None,
        "missing": (),
        "default_image": IMAGE,
        "default_vllm_image": VLLM_IMAGE,
    }
    arguments |= changes
    decision = plan_service(OWNER, spec or spec_of(), ServiceStatus(), **arguments)
    assert isinstance(decision, ServicePlan), decision
    return decision


def manifest(plan: ServicePlan, kind: str, name: str) -> dict[str, Any]:
    """One of a plan's manifests."""
    [found] = [m for m in service_manifests(plan) if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def deployment(
    plan: ServicePlan,
    component: str,
    *,
    ready: int | None = None,
    available: int | None = None,
    **status: Any,
) -> dict[str, Any]:
    """A Deployment as the API server has it, rolled out with `ready` pods ready (all of them by default).

    `available` of them have been ready for minReadySeconds (all of them by default).
    """
    made = manifest(plan, "Deployment", f"{OWNER.name}-{component}")
    wanted = made["spec"]["replicas"]
    ready = wanted if ready is None else ready
    counts = {
        "replicas": wanted,
        "updatedReplicas": wanted,
        "readyReplicas": ready,
        "availableReplicas": ready if available is None else available,
    }
    made["metadata"]["generation"] = 1
    return {**made, "status": {"observedGeneration": 1, **counts, **status}}


def pod(component: str, **status: Any) -> dict[str, Any]:
    """A running and ready pod of a component; `status` replaces fields of its status."""
    container = {"name": f"yuan2-{component}", "ready": True, "state": {"running": {}}}
    return {
        "metadata": {
            "name": f"{OWNER.name}-{component}-abc",
            "namespace": OWNER.namespace,
            "labels": selector_labels(OWNER, component),
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": container["name"]}]},
        "status": {"phase": "Running", "containerStatuses": [container], **status},
    }


def ended(component: str, code: int, **terminated: Any) -> Mapping[str, Any]:
    """The status of a pod whose container waits to be started again after it ended with `code`."""
    last = {"terminated": {"exitCode": code, **terminated}}
    entry = {
        "name": f"yuan2-{component}",
        "ready": False,
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
        "lastState": last,
    }
    return {"phase": "Running", "containerStatuses": [entry]}
