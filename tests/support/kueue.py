"""A real Kueue beside a control plane without a node: its CRDs, its webhooks, its controllers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster import await_crds
from tests.support.ports import free_port
from yuan2_local.certs import Certificate, ensure_pki
from yuan2_local.client import ApiError
from yuan2_local.gobuild import ensure_binaries

SERVED = {"jobs", "pods", "workloads", "clusterqueues", "localqueues", "resourceflavors", "cohorts"}
"""Webhooks of Kueue for other kinds are left out: their integrations are off."""
KINDS = (
    "Namespace",
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
)
API = "/apis/kueue.x-k8s.io/v1beta2"


@contextlib.contextmanager
def running_kueue(cluster: Any, directory: Path) -> Iterator[Path]:
    """Kueue runs as the administrator inside this context; gives its log."""
    binary = ensure_binaries(cluster.cache, ["kueue"])["kueue"]
    port, health = free_port(), free_port()
    pki = cluster.state.pki
    ensure_pki(pki, [Certificate("kueue", "kueue", dns=("localhost",), addresses=("127.0.0.1",))])
    certs = directory / "certs"
    certs.mkdir()
    for source, target in (("kueue.crt", "tls.crt"), ("kueue.key", "tls.key")):
        (certs / target).write_bytes((pki / source).read_bytes())
    config = directory / "kueue.yaml"
    config.write_text(json.dumps(_configuration(port, health, certs)))
    objects = list(_objects(cluster, binary.parent / "config", port, (pki / "ca.crt").read_bytes()))
    # Conversions are asked of Kueue, so it starts between its CRDs and its webhooks.
    crds = [entry for entry in objects if not entry["kind"].endswith("WebhookConfiguration")]
    _apply(cluster, crds)
    await_crds(cluster)
    log = directory / "kueue.log"
    environ = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "KUEUE_METRICS_CERTS": str(certs)}
    with log.open("wb") as output:
        # Without its aggregated API, which listens on a port of its own.
        command = [binary, f"--config={config}", "--feature-gates=VisibilityOnDemand=false"]
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    try:
        _await(process, f"http://127.0.0.1:{health}/readyz", log)
        _apply(cluster, [entry for entry in objects if entry not in crds])
        yield log
    finally:
        process.kill()
        process.wait(timeout=10)
        for entry in objects:
            if entry["kind"].endswith("WebhookConfiguration"):
                plural = entry["kind"].lower() + "s"
                cluster.client.delete(
                    f"/apis/admissionregistration.k8s.io/v1/{plural}/{entry['metadata']['name']}"
                )


def _configuration(port: int, health: int, certs: Path) -> dict[str, Any]:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"port": port, "host": "127.0.0.1", "certDir": str(certs)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "manageJobsWithoutQueueName": False,
        "integrations": {"frameworks": ["batch/job", "pod"]},
    }


def _objects(cluster: Any, config: Path, port: int, authority: bytes) -> Iterator[dict[str, Any]]:
    """What Kueue's own kustomization installs, but for what runs in pods."""
    bundle = base64.b64encode(authority).decode()
    for entry in yaml.safe_load_all(cluster.kubectl("kustomize", str(config / "default"))):
        if entry["kind"] not in KINDS:
            continue
        entry["metadata"].pop("annotations", None)
        if entry["kind"] == "CustomResourceDefinition":
            webhook = entry["spec"].get("conversion", {}).get("webhook")
            if webhook is not None:
                webhook["clientConfig"] = {"url": f"https://127.0.0.1:{port}/convert", "caBundle": bundle}
        for webhook in entry.get("webhooks", ()):
            path = webhook["clientConfig"]["service"]["path"]
            webhook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
        if "webhooks" in entry:
            entry["webhooks"] = [hook for hook in entry["webhooks"] if _served(hook)]
        yield entry


def _served(hook: dict[str, Any]) -> bool:
    return all(name.split("/")[0] in SERVED for rule in hook["rules"] for name in rule["resources"])


def _apply(cluster: Any, objects: list[dict[str, Any]]) -> None:
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump_all(objects)
    )


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise AssertionError(f"Kueue is not ready\n{log.read_text()[-3000:]}")


def make_queue(cluster: Any, namespace: str, cpus: int, labels: dict[str, str]) -> None:
    """A flavour of nodes, a ClusterQueue with so many CPUs of it, and the namespace's LocalQueue `team`."""
    name, client = namespace, cluster.client
    flavour = {"metadata": {"name": name}, "spec": {"nodeLabels": labels}}
    covered = [
        {"name": resource, "nominalQuota": amount} for resource, amount in (("cpu", cpus), ("memory", "64Gi"))
    ]
    queue = {
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [
                {"coveredResources": ["cpu", "memory"], "flavors": [{"name": name, "resources": covered}]}
            ],
        },
    }
    local = {"metadata": {"name": "team", "namespace": namespace}, "spec": {"clusterQueue": name}}
    _create(client, "resourceflavors", "ResourceFlavor", flavour)
    _create(client, "clusterqueues", "ClusterQueue", queue)
    _create(client, f"namespaces/{namespace}/localqueues", "LocalQueue", local)


def make_priority(cluster: Any, name: str, value: int) -> None:
    """A WorkloadPriorityClass."""
    _create(
        cluster.client,
        "workloadpriorityclasses",
        "WorkloadPriorityClass",
        {"metadata": {"name": name}, "value": value},
    )


def workloads(cluster: Any, namespace: str) -> list[dict[str, Any]]:
    """Workloads of a namespace."""
    try:
        return list(cluster.client.get(f"{API}/namespaces/{namespace}/workloads")["items"])
    except ApiError:
        return []


def _create(client: Any, path: str, kind: str, body: dict[str, Any]) -> None:
    client.create(f"{API}/{path}", {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, **body})
