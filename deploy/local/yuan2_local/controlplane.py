"""Command lines of etcd and the control plane, and the order in which they come up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import kubeconfig
from .certs import certificates, ensure_pki
from .client import Client
from .command import wait_until
from .network import API_SERVICE, POD_SUBNET, SERVICE_SUBNET
from .paths import State
from .ports import LOOPBACK
from .processes import Processes

PORT_NAMES = (
    "etcd",
    "etcd-peer",
    "apiserver",
    "controller-manager",
    "scheduler",
    "kube-proxy-health",
    "kube-proxy-metrics",
    "coredns-ready",
)
_READY_SECONDS = 90.0


@dataclass(frozen=True)
class ControlPlane:
    """Where a control plane listens. `address` is the API server's; everything else stays on the loopback."""

    state: State
    binaries: Mapping[str, Path]
    address: str
    ports: Mapping[str, int]
    node: str
    with_node: bool

    @property
    def server(self) -> str:
        """URL of the API server."""
        return f"https://{self.address}:{self.ports['apiserver']}"

    def client(self, user: str = "admin") -> Client:
        """A client as the user of one of the cluster's certificates."""
        return Client(self.server, self.state.pki, user)


def etcd_argv(plane: ControlPlane) -> list[str]:
    """etcd on the loopback, for clients with a certificate only."""
    pki = plane.state.pki
    client, peer = (f"https://{LOOPBACK}:{plane.ports[name]}" for name in ("etcd", "etcd-peer"))
    return [
        str(plane.binaries["etcd"]),
        "--name=local",
        f"--data-dir={plane.state.etcd}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        f"--trusted-ca-file={pki / 'ca.crt'}",
        f"--cert-file={pki / 'etcd.crt'}",
        f"--key-file={pki / 'etcd.key'}",
        "--client-cert-auth",
        f"--peer-trusted-ca-file={pki / 'ca.crt'}",
        f"--peer-cert-file={pki / 'etcd.crt'}",
        f"--peer-key-file={pki / 'etcd.key'}",
        "--peer-client-cert-auth",
        # A throwaway cluster loses nothing of worth in a power cut.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_argv(plane: ControlPlane) -> list[str]:
    """kube-apiserver with RBAC and Node authorization, and no anonymous access."""
    pki = plane.state.pki
    argv = [
        str(plane.binaries["kube-apiserver"]),
        f"--bind-address={plane.address}",
        f"--advertise-address={plane.address}",
        f"--secure-port={plane.ports['apiserver']}",
        f"--etcd-servers=https://{LOOPBACK}:{plane.ports['etcd']}",
        f"--etcd-cafile={pki / 'ca.crt'}",
        f"--etcd-certfile={pki / 'apiserver-etcd-client.crt'}",
        f"--etcd-keyfile={pki / 'apiserver-etcd-client.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'apiserver-kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'apiserver-kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-signing-key-file={pki / 'sa.key'}",
        f"--service-account-key-file={pki / 'sa.pub'}",
        f"--service-cluster-ip-range={SERVICE_SUBNET}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--anonymous-auth=false",
        "--allow-privileged=true",
        "--profiling=false",
        "--event-ttl=2h",
    ]
    if not plane.with_node:
        # The kubernetes Service needs a routable address; nothing runs in this flavour that would use it.
        argv.append("--endpoint-reconciler-type=none")
    return argv


def controller_manager_argv(plane: ControlPlane) -> list[str]:
    """kube-controller-manager, each controller as its own service account."""
    pki = plane.state.pki
    return [
        str(plane.binaries["kube-controller-manager"]),
        *_component_flags(plane, "controller-manager"),
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={pki / 'sa.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        f"--cluster-cidr={POD_SUBNET}",
        f"--service-cluster-ip-range={SERVICE_SUBNET}",
        # The defaults suit a control plane shared by thousands of nodes.
        "--kube-api-qps=100",
        "--kube-api-burst=200",
    ]


def scheduler_argv(plane: ControlPlane) -> list[str]:
    """kube-scheduler with its defaults."""
    return [str(plane.binaries["kube-scheduler"]), *_component_flags(plane, "scheduler")]


def _component_flags(plane: ControlPlane, name: str) -> list[str]:
    path = plane.state.config / f"{name}.kubeconfig"
    return [
        f"--kubeconfig={path}",
        f"--authentication-kubeconfig={path}",
        f"--authorization-kubeconfig={path}",
        f"--bind-address={LOOPBACK}",
        f"--secure-port={plane.ports[name]}",
        "--leader-elect=false",
        "--profiling=false",
    ]


def prepare(plane: ControlPlane) -> None:
    """Certificates and kubeconfigs; what is there already stays."""
    addresses = sorted({plane.address, LOOPBACK, API_SERVICE})
    ensure_pki(plane.state.pki, certificates(plane.node, addresses, plane.address))
    users = ["controller-manager"]
    if plane.with_node:
        users += ["scheduler", "kubelet", "kube-proxy", "coredns"]
    for user in users:
        kubeconfig.write(plane.state.config / f"{user}.kubeconfig", plane.server, plane.state.pki, user)
    kubeconfig.write(plane.state.kubeconfig, plane.server, plane.state.pki, "admin")


def start(plane: ControlPlane, processes: Processes) -> None:
    """Start what does not run and wait until the API server is ready and the controllers have begun."""
    processes.ensure("etcd", etcd_argv(plane))
    processes.ensure("kube-apiserver", apiserver_argv(plane))
    client = plane.client()
    _wait(processes, ["etcd", "kube-apiserver"], "kube-apiserver", lambda: client.ok("/readyz"))
    processes.ensure("kube-controller-manager", controller_manager_argv(plane))
    started = ["kube-controller-manager"]
    if plane.with_node:
        processes.ensure("kube-scheduler", scheduler_argv(plane))
        started.append("kube-scheduler")
    # Pods are refused until the controllers have made this account.
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    _wait(processes, started, "kube-controller-manager", lambda: client.ok(account))


def _wait(processes: Processes, names: list[str], what: str, ready: Callable[[], bool]) -> None:
    def check() -> bool:
        processes.check(names)
        return ready()

    wait_until(what, check, _READY_SECONDS, interval=0.05)
