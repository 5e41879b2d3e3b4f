"""Objects every cluster starts with: rights of its own components, and the default storage class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .client import Client

STORAGE_CLASS = "local"
PROVISIONER = "yuan2.dev/local"
_RBAC = "rbac.authorization.k8s.io"
_READ = ["get", "list", "watch"]


def _rule(group: str, resources: list[str], verbs: list[str]) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


def _role(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": rules,
    }


def _binding(role: str, user: str) -> dict[str, Any]:
    return {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": f"yuan2-local:{user.removeprefix('yuan2:')}"},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": _RBAC, "kind": "User", "name": user}],
    }


def control_plane_objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, object) of what both flavours have."""
    yield (
        f"/apis/storage.k8s.io/v1/storageclasses/{STORAGE_CLASS}",
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": STORAGE_CLASS,
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "Immediate",
        },
    )


def node_objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, object) of what a cluster with a node needs."""
    roles = [
        _role(
            "yuan2-local:coredns",
            [
                _rule("", ["endpoints", "services", "pods", "namespaces"], _READ),
                _rule("discovery.k8s.io", ["endpointslices"], _READ),
            ],
        ),
        _role(
            "yuan2-local:provisioner",
            [
                _rule("", ["persistentvolumes"], [*_READ, "create", "delete"]),
                _rule("", ["persistentvolumeclaims"], _READ),
            ],
        ),
    ]
    bindings = [
        _binding("yuan2-local:coredns", "yuan2:coredns"),
        _binding("yuan2-local:provisioner", "yuan2:local-provisioner"),
        _binding("system:kubelet-api-admin", "kube-apiserver-kubelet-client"),
    ]
    for role in roles:
        yield f"/apis/{_RBAC}/v1/clusterroles/{role['metadata']['name']}", role
    for binding in bindings:
        yield f"/apis/{_RBAC}/v1/clusterrolebindings/{binding['metadata']['name']}", binding


def apply_objects(client: Client, with_node: bool) -> None:
    """Apply them all."""
    for path, body in control_plane_objects():
        client.apply(path, body)
    if with_node:
        for path, body in node_objects():
            client.apply(path, body)
