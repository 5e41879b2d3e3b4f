"""Rendered configuration says what the cluster promises."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest

from yuan2_local import controlplane, kubeconfig, node
from yuan2_local.certs import certificates, ensure_pki, extensions
from yuan2_local.command import run
from yuan2_local.controlplane import PORT_NAMES, ControlPlane
from yuan2_local.gobuild import NODE
from yuan2_local.paths import Cache, State, cache_from, is_foreign, node_state
from yuan2_local.ports import free_ports, is_free, preferred_port
from yuan2_local.registry import config


def plane(with_node: bool = True) -> ControlPlane:
    binaries = {name: Path("/bin") / name for name in NODE}
    ports = {name: 20000 + index for index, name in enumerate(PORT_NAMES)}
    return ControlPlane(State(Path("/state")), binaries, "10.244.0.1", ports, "local", with_node)


def test_the_api_server_authorizes_nodes_and_roles_and_knows_no_anonymous() -> None:
    argv = controlplane.apiserver_argv(plane())
    assert "--authorization-mode=Node,RBAC" in argv
    assert "--anonymous-auth=false" in argv
    assert "--enable-admission-plugins=NodeRestriction" in argv
    assert "--kubelet-certificate-authority=/state/pki/ca.crt" in argv


def test_only_a_control_plane_without_node_leaves_the_kubernetes_service_without_endpoint() -> None:
    flag = "--endpoint-reconciler-type=none"
    assert flag in controlplane.apiserver_argv(plane(with_node=False))
    assert flag not in controlplane.apiserver_argv(plane(with_node=True))


def test_etcd_wants_client_certificates() -> None:
    argv = controlplane.etcd_argv(plane())
    assert "--client-cert-auth" in argv
    assert "--listen-client-urls=https://127.0.0.1:20000" in argv


def test_every_component_has_its_own_port() -> None:
    words = [
        *controlplane.etcd_argv(plane()),
        *controlplane.apiserver_argv(plane()),
        *controlplane.controller_manager_argv(plane()),
        *controlplane.scheduler_argv(plane()),
    ]
    ports = [word.partition("=")[2] for word in words if word.startswith("--secure-port=")]
    assert len(ports) == 3 == len(set(ports))


def test_the_kubelet_asks_the_api_server_and_knows_no_anonymous() -> None:
    rendered = node.kubelet_config(State(Path("/state")))
    assert rendered["authentication"]["anonymous"] == {"enabled": False}
    assert rendered["authentication"]["webhook"] == {"enabled": True}
    assert rendered["authorization"] == {"mode": "Webhook"}
    assert rendered["readOnlyPort"] == 0


def test_containerd_keeps_to_its_own_folders(tmp_path: Path) -> None:
    text = node.containerd_config(State(tmp_path), Cache(Path('/with "quotes"')), "pause:1", "/usr/lib/cni")
    assert 'root = "/with \\"quotes\\"/containerd"' in text
    assert f'address = "{tmp_path}/run/containerd.sock"' in text
    assert "restrict_oom_score_adj = true" in text


@pytest.mark.parametrize(("upstream", "forwards"), [("/etc/resolv.conf", True), (None, False)])
def test_dns_forwards_only_where_the_host_resolves(upstream: str | None, forwards: bool) -> None:
    assert ("forward ." in node.corefile(State(Path("/state")), upstream, 1)) is forwards


def test_a_resolv_conf_of_comments_names_no_server() -> None:
    assert not node.has_nameserver("# nameserver 192.0.2.1\nsearch example.org\n")
    assert node.has_nameserver("search example.org\nnameserver 192.0.2.1\n")


def test_clients_certificates_serve_nothing() -> None:
    by_name = {c.name: c for c in certificates("local", ["10.244.0.1"], "10.244.0.1")}
    assert "serverAuth" not in extensions(by_name["admin"])
    assert "IP:10.244.0.1" in extensions(by_name["apiserver"])
    assert by_name["kubelet"].subject == "/O=system:nodes/CN=system:node:local"


def test_certificates_are_signed_by_the_authority_once_and_keys_are_private(tmp_path: Path) -> None:
    wanted = certificates("local", ["127.0.0.1"], "127.0.0.1")[:2]
    ensure_pki(tmp_path, wanted)
    first = (tmp_path / "etcd.crt").read_bytes()
    ensure_pki(tmp_path, wanted)
    assert (tmp_path / "etcd.crt").read_bytes() == first
    assert run(["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "etcd.crt"]).endswith("OK\n")
    assert (tmp_path / "etcd.key").stat().st_mode & 0o077 == 0
    kubeconfig.write(tmp_path / "kubeconfig", "https://127.0.0.1:1", tmp_path, "etcd")
    assert (tmp_path / "kubeconfig").stat().st_mode & 0o077 == 0
    assert json.loads((tmp_path / "kubeconfig").read_text())["current-context"] == "yuan2-local"


def test_free_ports_are_different_and_a_taken_preference_is_not_chosen() -> None:
    ports = free_ports(["a", "b", "c"])
    assert len(set(ports.values())) == 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert preferred_port(port) != port
    assert preferred_port(ports["a"]) == ports["a"]


def test_the_registry_listens_on_the_loopback_only() -> None:
    assert config(Path("/blobs"), 5000)["http"] == {"addr": "127.0.0.1:5000"}


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_from({"YUAN2_CACHE": "/a"}).root == Path("/a")
    assert cache_from({"XDG_CACHE_HOME": "/b"}).root == Path("/b/yuan2")
    assert cache_from({}).root == Path.home() / ".cache" / "yuan2"


def test_our_own_kubeconfig_is_not_another_cluster() -> None:
    own = node_state({"YUAN2_STATE": "/s"}).kubeconfig
    assert not is_foreign({"YUAN2_STATE": "/s", "KUBECONFIG": str(own)})
    assert not is_foreign({})
    assert is_foreign({"KUBECONFIG": "/home/someone/.kube/config"})


def test_the_files_of_a_node_that_runs_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kube-proxy ends when its file is written: a second `up` left a node without services."""
    monkeypatch.setattr(node, "cni_bin_dir", lambda: "/opt/cni/bin")
    made = dataclasses.replace(plane(), state=State(tmp_path))
    cache = Cache(tmp_path / "cache")
    assert node.KUBE_PROXY_FILE in node.write_configs(made, cache, "pause:1")
    config = made.state.config / node.KUBE_PROXY_FILE
    os.utime(config, (1, 1))
    assert node.write_configs(made, cache, "pause:1") == set()
    assert config.stat().st_mtime == 1
    assert node.write_configs(made, cache, "pause:2") == {"containerd.toml"}
