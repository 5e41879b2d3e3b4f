"""Configuration and command lines of the node: containerd, CNI, kubelet, kube-proxy, CoreDNS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .client import Client
from .controlplane import ControlPlane
from .errors import ClusterError
from .network import BRIDGE, NODE_ADDRESS, POD_SUBNET
from .paths import Cache, State
from .ports import LOOPBACK
from .rules import CNI_NETWORK

NODE_NAME = "local"
CLUSTER_DOMAIN = "cluster.local"
KUBE_PROXY_FILE = "kube-proxy.yaml"
_MAX_PODS = 250
_CNI_BIN_DIRS = ("/usr/lib/cni", "/opt/cni/bin")


def cni_bin_dir() -> str:
    """Where the CNI plugins are installed."""
    for directory in _CNI_BIN_DIRS:
        if Path(directory, "bridge").exists():
            return directory
    raise ClusterError("CNI plugins: not found; install the package containernetworking-plugins")


def cni_config(state: State) -> dict[str, Any]:
    """A bridge with masquerading and hairpin, addresses from one subnet, and host ports."""
    return {
        "cniVersion": "0.4.0",
        "name": CNI_NETWORK,
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                "ipMasq": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": POD_SUBNET, "gateway": NODE_ADDRESS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": str(state.run / "cni-addresses"),
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def containerd_config(state: State, cache: Cache, sandbox_image: str, cni_bin: str) -> str:
    """containerd's TOML: its own folders and socket, apart from any other containerd of this machine."""
    return f"""version = 2
root = {_quoted(cache.containerd)}
state = {_quoted(state.run / "containerd")}
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = {_quoted(state.containerd_socket)}

[debug]
level = "warn"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {_quoted(sandbox_image)}
# Without CAP_SYS_RESOURCE a score below our own cannot be set, and every sandbox would fail.
restrict_oom_score_adj = true
enable_unprivileged_ports = true
enable_unprivileged_icmp = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {_quoted(cni_bin)}
conf_dir = {_quoted(state.config / "cni")}

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
# A layer is kept unpacked only: the registry still has it.
discard_unpacked_layers = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def _quoted(value: object) -> str:
    return json.dumps(str(value))


def kubelet_config(state: State) -> dict[str, Any]:
    """KubeletConfiguration: authentication and authorization through the API server, nothing anonymous."""
    pki = state.pki
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "port": 10250,
        "readOnlyPort": 0,
        "healthzPort": 0,
        "tlsCertFile": str(pki / "kubelet.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet.key"),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{state.containerd_socket}",
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [NODE_ADDRESS],
        "resolvConf": str(state.config / "resolv.conf"),
        "podLogsDir": str(state.root / "pod-logs"),
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "makeIPTablesUtilChains": False,
        "maxPods": _MAX_PODS,
        "serializeImagePulls": False,
        "maxParallelImagePulls": 3,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        # Small thresholds: a machine with little free disk is still good for a demo.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "shutdownGracePeriod": "0s",
    }


def kube_proxy_config(state: State, ports: Mapping[str, int]) -> dict[str, Any]:
    """KubeProxyConfiguration for nftables."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(state.config / "kube-proxy.kubeconfig")},
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": POD_SUBNET,
        # Pods share one bridge: an answer that did not pass the host again would come from the wrong address.
        "nftables": {"masqueradeAll": True},
        "conntrack": {"maxPerCore": 0},
        "healthzBindAddress": f"{LOOPBACK}:{ports['kube-proxy-health']}",
        "metricsBindAddress": f"{LOOPBACK}:{ports['kube-proxy-metrics']}",
    }


def corefile(state: State, upstream: str | None, ready_port: int) -> str:
    """CoreDNS' configuration; `upstream` is the host's resolv.conf, None when that names no server."""
    forward = f"    forward . {upstream} {{\n        max_concurrent 100\n    }}\n" if upstream else ""
    return f""".:53 {{
    bind {NODE_ADDRESS}
    errors
    ready {LOOPBACK}:{ready_port}
    cache 5
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {state.config / "coredns.kubeconfig"}
        pods insecure
        ttl 1
        fallthrough in-addr.arpa ip6.arpa
    }}
{forward}}}
"""


def has_nameserver(resolv_conf: str) -> bool:
    """Whether a resolv.conf text names a server."""
    return any(line.split()[:1] == ["nameserver"] for line in resolv_conf.splitlines())


def write_configs(plane: ControlPlane, cache: Cache, sandbox_image: str) -> set[str]:
    """Render every configuration file of the node; gives the names of those that are new or different.

    The others are not touched: kube-proxy watches its file and ends when it is written, even with the same
    text (initWatcher in cmd/kube-proxy/app/options.go).
    """
    state = plane.state
    (state.config / "cni").mkdir(parents=True, exist_ok=True)
    host = Path("/etc/resolv.conf")
    upstream = str(host) if host.exists() and has_nameserver(host.read_text()) else None
    files = {
        "containerd.toml": containerd_config(state, cache, sandbox_image, cni_bin_dir()),
        "cni/10-yuan2.conflist": json.dumps(cni_config(state), indent=2),
        "kubelet.yaml": json.dumps(kubelet_config(state), indent=2),
        KUBE_PROXY_FILE: json.dumps(kube_proxy_config(state, plane.ports), indent=2),
        "Corefile": corefile(state, upstream, plane.ports["coredns-ready"]),
        # Pods that ask for the node's own DNS get our server too, without the host's search domains.
        "resolv.conf": f"nameserver {NODE_ADDRESS}\n",
    }
    return {name for name, text in files.items() if _write_if_different(state.config / name, text)}


def _write_if_different(path: Path, text: str) -> bool:
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    return True


def containerd_argv(state: State) -> list[str]:
    """containerd."""
    return [_installed("containerd"), "--config", str(state.config / "containerd.toml")]


def kubelet_argv(plane: ControlPlane) -> list[str]:
    """kubelet, registering the node under its fixed name."""
    state = plane.state
    return [
        str(plane.binaries["kubelet"]),
        f"--config={state.config / 'kubelet.yaml'}",
        f"--kubeconfig={state.config / 'kubelet.kubeconfig'}",
        f"--root-dir={state.kubelet}",
        f"--cert-dir={state.kubelet / 'pki'}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={NODE_ADDRESS}",
    ]


def kube_proxy_argv(plane: ControlPlane) -> list[str]:
    """kube-proxy."""
    return [str(plane.binaries["kube-proxy"]), f"--config={plane.state.config / KUBE_PROXY_FILE}"]


def coredns_argv(plane: ControlPlane) -> list[str]:
    """CoreDNS on the node's address."""
    return [str(plane.binaries["coredns"]), "-conf", str(plane.state.config / "Corefile")]


def _installed(name: str) -> str:
    found = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise ClusterError(f"{name}: not found; install the package {name}")
    return found


def set_gpus(client: Client, count: int) -> None:
    """Make the node report `count` nvidia.com/gpu, which the scheduler and the kubelet then believe."""
    amount = {"nvidia.com/gpu": str(count) if count else None}
    client.merge(f"/api/v1/nodes/{NODE_NAME}/status", {"status": {"capacity": amount, "allocatable": amount}})
