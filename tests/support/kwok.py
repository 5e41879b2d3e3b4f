"""Simulated nodes (kwok) and a real scheduler beside a control plane without a node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for
from yuan2_local import cluster as local
from yuan2_local import controlplane, kubeconfig
from yuan2_local.gobuild import CONTROL_PLANE, ensure_binaries
from yuan2_local.processes import Processes

STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
    "pod/fast/pod-ready",
    "pod/fast/pod-delete",
)
"""Nodes are ready, pods run at once and go when they are deleted; they end only when somebody says so."""
POD_ADDRESSES = "127.128.0.0/16"
"""On the loopback, so that a test can answer for a pod."""
GPUS = 8


@contextlib.contextmanager
def simulated_nodes(cluster: Any, directory: Path, count: int) -> Iterator[None]:
    """So many nodes with eight GPUs, and a scheduler without limits of its own, inside this context."""
    binaries = ensure_binaries(cluster.cache, ["kwok", "kube-scheduler", *CONTROL_PLANE])
    plane = controlplane_of(cluster, binaries)
    kubeconfig.write(plane.state.config / "scheduler.kubeconfig", plane.server, plane.state.pki, "scheduler")
    stages = binaries["kwok"].parent / "kustomize" / "stage"
    config = directory / "kwok.yaml"
    config.write_text("---\n".join((stages / f"{name}.yaml").read_text() for name in STAGES))
    processes = Processes(cluster.state)
    processes.ensure(
        "kube-scheduler",
        [*controlplane.scheduler_argv(plane), "--kube-api-qps=1000", "--kube-api-burst=2000"],
    )
    processes.ensure(
        "kwok",
        [
            binaries["kwok"],
            f"--kubeconfig={cluster.kubeconfig}",
            f"--config={config}",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
            f"--cidr={POD_ADDRESSES}",
        ],
    )
    for number in range(count):
        cluster.client.create("/api/v1/nodes", _node(f"kwok-{number}"))
    try:
        wait_for("the nodes", lambda: _ready(cluster) >= count, 120, every=0.5)
        yield
    finally:
        processes.stop("kwok")
        processes.stop("kube-scheduler")


def controlplane_of(cluster: Any, binaries: dict[str, Path]) -> controlplane.ControlPlane:
    """The control plane with its programs, to start them otherwise."""
    known = local.load(cluster.state)
    assert known is not None
    return local.plane_of(cluster.state, known, binaries)


def job_controller_limits(cluster: Any, *, raised: bool) -> None:
    """Start the controllers again, with their default client limits or with the cluster's raised ones."""
    plane = controlplane_of(cluster, ensure_binaries(cluster.cache, CONTROL_PLANE))
    words = [
        word
        for word in controlplane.controller_manager_argv(plane)
        if raised or not word.startswith("--kube-api-")
    ]
    processes = Processes(cluster.state)
    processes.stop("kube-controller-manager")
    processes.ensure("kube-controller-manager", words)


def make_claims(client: Any, namespace: str, names: tuple[str, ...]) -> None:
    """Bound claims, so that the scheduler takes the pods."""
    for name in names:
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        volume = {
            "metadata": {"name": f"{namespace}-{name}"},
            "spec": {
                "capacity": size,
                "accessModes": modes,
                "storageClassName": "none",
                "hostPath": {"path": "/nowhere"},
                "claimRef": {"namespace": namespace, "name": name},
            },
        }
        claim = {
            "metadata": {"name": name},
            "spec": {"accessModes": modes, "storageClassName": "none", "resources": {"requests": size}},
        }
        client.create("/api/v1/persistentvolumes", {"apiVersion": "v1", "kind": "PersistentVolume", **volume})
        path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
        client.create(path, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim})
        wait_for(
            f"claim {name}",
            lambda place=f"{path}/{name}": client.get(place).get("status", {}).get("phase") == "Bound",
            60,
        )


def _node(name: str) -> dict[str, Any]:
    room = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(GPUS)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "type": "kwok"},
        },
        "status": {"allocatable": room, "capacity": room},
    }


def _ready(cluster: Any) -> int:
    nodes = cluster.client.get("/api/v1/nodes?labelSelector=type=kwok")["items"]
    conditions = [entry for node in nodes for entry in node.get("status", {}).get("conditions", ())]
    return sum(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)
