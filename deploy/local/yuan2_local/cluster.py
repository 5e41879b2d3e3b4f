"""Bringing a cluster up, healing it, and removing every trace of it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from . import cleanup, controlplane, network, node, registry, rules
from .apt import ensure_packages
from .cleanup import Host
from .command import deferred_interrupts, exclusive, run, step, wait_until
from .controlplane import PORT_NAMES, ControlPlane
from .errors import ClusterError
from .gobuild import CONTROL_PLANE, NODE, ensure_binaries
from .objects import apply_objects
from .oci import single_file_archive
from .paths import LOCAL, Cache, State
from .ports import LOOPBACK, free_ports
from .processes import Processes
from .prune import prune_node

API_PORT = 6443
_NODE_SECONDS = 90.0


@dataclass(frozen=True)
class Cluster:
    """What a cluster chose when it was made; kept in its state folder."""

    with_node: bool
    ports: dict[str, int]
    before: Host | None = None

    def save(self, state: State) -> None:
        """Write it, whole or not at all."""
        partial = state.cluster_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2))
        partial.replace(state.cluster_file)


def load(state: State) -> Cluster | None:
    """The cluster of a state folder, or None."""
    try:
        data = json.loads(state.cluster_file.read_text())
    except FileNotFoundError:
        return None
    return Cluster(data["with_node"], data["ports"], Host(**data["before"]) if data["before"] else None)


def plane_of(state: State, cluster: Cluster, binaries: dict[str, Path]) -> ControlPlane:
    """The control plane of a cluster."""
    address = network.NODE_ADDRESS if cluster.with_node else LOOPBACK
    return ControlPlane(state, binaries, address, cluster.ports, node.NODE_NAME, cluster.with_node)


def running(state: State) -> ControlPlane:
    """The control plane of a cluster that was made; ClusterError when there is none."""
    cluster = load(state)
    if cluster is None:
        raise ClusterError("no cluster runs: `cluster.py up` starts one")
    return plane_of(state, cluster, {})


def up(cache: Cache, state: State, with_node: bool) -> ControlPlane:
    """Start or heal the cluster and return its control plane when it is ready.

    On any failure and on Ctrl-C everything that this call started is gone again; a cluster that ran before
    is left as it was, less what was started here.
    """
    if with_node and os.geteuid() != 0:
        raise ClusterError(
            "the node needs root: run as root, name your own cluster with KUBECONFIG and REGISTRY, or start "
            "the control plane alone with `cluster.py up --control-plane-only`"
        )
    with exclusive(cache.locks / f"cluster{str(state.root).replace('/', '-')}.lock"):
        before = Processes(state).running()
        try:
            return _up(cache, state, with_node)
        except BaseException:
            with deferred_interrupts():
                if before:
                    _stop_new(state, before)
                else:
                    _down(cache, state)
            raise


def _up(cache: Cache, state: State, with_node: bool) -> ControlPlane:
    if with_node:
        ensure_packages()
    binaries = ensure_binaries(cache, NODE if with_node else CONTROL_PLANE)
    publish_kubectl(cache, binaries["kubectl"])
    if not Processes(state).running():
        # The leftovers of a machine that lost power, if any.
        _down(cache, state)
    fresh = load(state) is None
    cluster = _chosen(state, with_node)
    plane = plane_of(state, cluster, binaries)
    with step("certificates"):
        controlplane.prepare(plane)
    processes = Processes(state)
    if with_node:
        with step("network"):
            network.ensure_bridge()
    with step("control plane"):
        controlplane.start(plane, processes)
        apply_objects(plane.client(), with_node)
    if with_node:
        _start_node(cache, plane, processes, fresh)
    return plane


def _chosen(state: State, with_node: bool) -> Cluster:
    cluster = load(state)
    if cluster is None:
        ports = free_ports(PORT_NAMES)
        if with_node:
            ports["apiserver"] = API_PORT
        cluster = Cluster(with_node, ports, cleanup.observe_host() if with_node else None)
        state.root.mkdir(parents=True, exist_ok=True)
        cluster.save(state)
    if cluster.with_node != with_node:
        raise ClusterError(
            f"{state.root}: a cluster of the other flavour runs there; `down` it, or choose another --name"
        )
    return cluster


def _start_node(cache: Cache, plane: ControlPlane, processes: Processes, fresh: bool) -> None:
    with step("registry"):
        address = registry.ensure_registry(cache)
    with step("containerd"):
        image = f"yuan2.dev/pause:{plane.binaries['pause'].parent.name.rsplit('-', 1)[1]}"
        if node.KUBE_PROXY_FILE in node.write_configs(plane, cache, image):
            processes.stop("kube-proxy")  # it is about to end by itself; who asks now would still see it live
        processes.ensure("containerd", node.containerd_argv(plane.state))
        cleanup.await_containerd(plane.state, processes)
        if fresh:
            # Pods of a cluster that a power cut ended are in the cached containerd still.
            cleanup.sweep_containers(plane.state, plane.binaries["crisweep"])
            prune_node(plane.state, address)
        _import_pause(plane, image)
    with step("node"):
        processes.ensure("kubelet", node.kubelet_argv(plane))
        processes.ensure("kube-proxy", node.kube_proxy_argv(plane))
        processes.ensure("coredns", node.coredns_argv(plane))
        processes.ensure(
            "provisioner", [shutil.which("python3") or "python3", LOCAL / "cluster.py", "provision"]
        )
        _await_node(plane, processes)


def _import_pause(plane: ControlPlane, reference: str) -> None:
    known = run(["ctr", "--address", plane.state.containerd_socket, "-n", "k8s.io", "images", "ls", "-q"])
    if reference in known.split():
        return
    archive = plane.state.run / "pause.tar"
    single_file_archive(plane.binaries["pause"], reference, archive)
    run(["ctr", "--address", plane.state.containerd_socket, "-n", "k8s.io", "images", "import", archive])
    archive.unlink()


def _await_node(plane: ControlPlane, processes: Processes) -> None:
    client = plane.client()

    def ready() -> bool:
        processes.check(["containerd", "kubelet", "kube-proxy", "coredns", "provisioner"])
        try:
            conditions = client.get(f"/api/v1/nodes/{node.NODE_NAME}")["status"].get("conditions", [])
        except (OSError, ClusterError):
            return False
        is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return is_ready and _dns_ready(plane) and rules.reaches_api(network.API_SERVICE)

    wait_until("node", ready, _NODE_SECONDS, interval=0.1)


def _dns_ready(plane: ControlPlane) -> bool:
    return registry.answers(f"http://{LOOPBACK}:{plane.ports['coredns-ready']}/ready")


def publish_kubectl(cache: Cache, kubectl: Path) -> None:
    """Keep `bin/kubectl` of the cache pointing at the newest build, for people's PATH."""
    link = cache.binaries / "kubectl"
    if not link.is_symlink() or link.readlink() != kubectl:
        partial = cache.binaries / f"kubectl.{os.getpid()}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(kubectl)
        partial.replace(link)


def down(cache: Cache, state: State) -> None:
    """End the cluster and remove every trace but the cache."""
    with exclusive(cache.locks / f"cluster{str(state.root).replace('/', '-')}.lock"), deferred_interrupts():
        _down(cache, state)


def _down(cache: Cache, state: State) -> None:
    cluster = load(state)
    if cluster is None:
        return
    processes = Processes(state)
    if cluster.with_node:
        cleanup.remove_pods(cache, state, processes)
        processes.stop("containerd")
    processes.kill_all()
    if cluster.before:
        cleanup.remove_traces(cache, state, cluster.before)
    shutil.rmtree(state.root)


def _stop_new(state: State, before: set[str]) -> None:
    processes = Processes(state)
    for name in processes.running() - before:
        processes.stop(name)
