"""The one-node cluster is a real Kubernetes: pods, names, tokens, volumes, logs, GPUs, authorization."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import TestCluster
from yuan2_local import cluster
from yuan2_local.errors import ClusterError

pytestmark = pytest.mark.node

NAMESPACE = "local-node"
SERVE = ["python3", "-m", "http.server", "8000"]
PROBE = """
import json, os, socket, ssl, time, urllib.request
account = "/var/run/secrets/kubernetes.io/serviceaccount/"
token = open(account + "token").read()
headers = {"Authorization": "Bearer " + token}
request = urllib.request.Request("https://kubernetes.default/api", headers=headers)
context = ssl.create_default_context(cafile=account + "ca.crt")
def page(host):
    # A Service reaches its pods a moment after they are ready.
    for attempt in range(50):
        try:
            return urllib.request.urlopen(f"http://{host}/etc/hostname", timeout=10).read().decode().strip()
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{host} cannot be reached")
open("/out/" + socket.gethostname(), "w").write("written")
print(json.dumps({
    "uid": os.getuid(),
    "api": json.load(urllib.request.urlopen(request, context=context, timeout=10))["kind"],
    "by_headless_name": page("pair-1.pair:8000"),
    "by_cluster_ip": page("pair-vip"),
    "shared_memory": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
}))
"""


def pair(image: str) -> list[dict[str, Any]]:
    """Two pods of an Indexed Job with stable names, a claim of no class, and memory for /dev/shm."""
    container = {
        "name": "main",
        "image": image,
        "command": SERVE,
        "readinessProbe": {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "out", "mountPath": "/out"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "subdomain": "pair",
        "securityContext": {"runAsUser": 1000, "runAsNonRoot": True},
        "containers": [container],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
            {"name": "out", "persistentVolumeClaim": {"claimName": "out"}},
        ],
    }
    labels = {"app": "pair"}
    policy = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [78]}}]}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "out"},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "pair"},
            "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "pair-vip"},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "pair"},
            "spec": {
                "completions": 2,
                "parallelism": 2,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podFailurePolicy": policy,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]


@pytest.fixture(scope="module")
def space(node_cluster: TestCluster) -> Iterator[TestCluster]:
    cluster.up(
        node_cluster.cache, node_cluster.state, with_node=True
    )  # as `make demo` does on a node that runs
    objects = {"apiVersion": "v1", "kind": "List", "items": pair(node_cluster.image("python"))}
    node_cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        node_cluster.kubectl("-n", NAMESPACE, "apply", "-f", "-", input=json.dumps(objects))
        ready = "--for=jsonpath={.status.ready}=2"
        node_cluster.kubectl("-n", NAMESPACE, "wait", ready, "job/pair", "--timeout=120s")
        yield node_cluster
    finally:
        node_cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")


def first_pod(space: TestCluster) -> str:
    selector = ("-l", "batch.kubernetes.io/job-completion-index=0", "-o", "name")
    return space.kubectl("-n", NAMESPACE, "get", "pods", *selector).strip()


def test_a_pod_reaches_its_peers_the_api_server_and_its_volume(space: TestCluster) -> None:
    said = space.kubectl("-n", NAMESPACE, "exec", "-i", first_pod(space), "--", "python3", "-", input=PROBE)
    answer = json.loads(said)
    assert answer["by_cluster_ip"] in {"pair-0", "pair-1"}
    assert {name: answer[name] for name in ("uid", "api", "by_headless_name")} == {
        "uid": 1000,
        "api": "APIVersions",
        "by_headless_name": "pair-1",
    }
    assert answer["shared_memory"] == 64 * 2**20
    assert (space.volume_path(f"{NAMESPACE}/out") / "pair-0").read_text() == "written"


def test_the_host_reaches_pods_and_services(space: TestCluster) -> None:
    service = space.kubectl("-n", NAMESPACE, "get", "service", "pair-vip", "-o", "jsonpath={.spec.clusterIP}")
    pod = space.kubectl("-n", NAMESPACE, "get", first_pod(space), "-o", "jsonpath={.status.podIP}")
    for address in (service, f"{pod}:8000"):
        with urllib.request.urlopen(f"http://{address}/etc/hostname", timeout=10) as page:
            assert page.read().decode().startswith("pair-")


def test_logs_and_the_pod_proxy_work(space: TestCluster) -> None:
    pod = first_pod(space).removeprefix("pod/")
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:8000/proxy/etc/hostname"
    assert space.kubectl("get", "--raw", path) == "pair-0\n"
    assert "GET /etc/hostname" in space.kubectl("-n", NAMESPACE, "logs", pod)


def test_the_kubelet_answers_nobody_without_a_name(space: TestCluster) -> None:
    address = space.kubectl("get", "node", "local", "-o", "jsonpath={.status.addresses[0].address}")
    context = ssl.create_default_context(cafile=str(space.state.pki / "ca.crt"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"https://{address}:10250/pods", context=context, timeout=10)
    refused.value.close()
    assert refused.value.code == 401


def test_a_pod_that_asks_for_gpus_runs_where_the_node_says_it_has_them(space: TestCluster) -> None:
    space.set_gpus(8)
    container = {
        "name": "main",
        "image": space.image("python"),
        "command": ["true"],
        "resources": {"limits": {"nvidia.com/gpu": "4"}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "gpus"},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }
    try:
        space.kubectl("-n", NAMESPACE, "apply", "-f", "-", input=json.dumps(pod))
        done = "--for=jsonpath={.status.phase}=Succeeded"
        space.kubectl("-n", NAMESPACE, "wait", done, "pod/gpus", "--timeout=60s")
    finally:
        space.set_gpus(0)


def test_a_small_volume_gets_full_and_is_gone_with_its_claim(space: TestCluster) -> None:
    claim = f"{NAMESPACE}/small"
    directory = space.volume(claim, size="1Mi", tmpfs=True)
    body = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "small", "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
    }
    space.kubectl("apply", "-f", "-", input=json.dumps(body))
    bound = "--for=jsonpath={.status.phase}=Bound"
    space.kubectl("-n", NAMESPACE, "wait", bound, "pvc/small", "--timeout=30s")
    with pytest.raises(OSError, match="No space left"):
        (directory / "big").write_bytes(bytes(2 * 2**20))
    space.kubectl("-n", NAMESPACE, "delete", "pvc", "small")
    space.kubectl("wait", "--for=delete", f"pv/local-{NAMESPACE}-small", "--timeout=60s")
    assert not directory.exists()


def test_a_pod_can_be_evicted(space: TestCluster) -> None:
    pod = first_pod(space).removeprefix("pod/")
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    space.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(body))
    space.kubectl("-n", NAMESPACE, "wait", "--for=delete", f"pod/{pod}", "--timeout=60s")
    with pytest.raises(ClusterError, match="not found"):
        space.kubectl("-n", NAMESPACE, "get", "pod", pod)
