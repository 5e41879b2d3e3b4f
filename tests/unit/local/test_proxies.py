"""Behind a proxy, what is on this machine is still asked directly, and a package mirror serves pip and uv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yuan2_local.cli import exports
from yuan2_local.images import package_arguments
from yuan2_local.network import NODE_ADDRESS
from yuan2_local.paths import REPOSITORY, Cache, State
from yuan2_local.processes import Processes
from yuan2_local.proxies import around_proxy, without_proxy

PROXY = "http://127.0.0.1:9"


def test_the_clusters_programs_get_no_proxy() -> None:
    assert without_proxy({"HTTPS_PROXY": PROXY, "no_proxy": "y", "PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_started_process_is_behind_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("all_proxy", PROXY)
    processes = Processes(State(tmp_path))
    try:
        processes.ensure("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
        pid = processes.records()["sleep"].pid
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert not [
            variable for variable in variables if variable.partition("=")[0].lower().endswith("_proxy")
        ]
        assert f"PATH={os.environ['PATH']}" in variables
    finally:
        processes.kill_all()


@pytest.mark.parametrize("environ", [{}, {"NO_PROXY": "example.org"}, {"HTTPS_PROXY": ""}])
def test_without_a_proxy_nothing_is_added(environ: dict[str, str]) -> None:
    assert around_proxy(environ) == {}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_clusters_addresses_join_a_users_exceptions(name: str) -> None:
    added = around_proxy({name: PROXY, "NO_PROXY": "a.example, b.example", "no_proxy": "a.example"})
    assert added["NO_PROXY"] == added["no_proxy"]
    parts = added["NO_PROXY"].split(",")
    assert parts[:2] == ["a.example", "b.example"]
    assert {"localhost", "127.0.0.1", "::1", NODE_ADDRESS, "10.96.0.0/16"} < set(parts)
    assert len(parts) == len(set(parts))
    assert around_proxy({name: PROXY, **added}) == added


def test_up_says_how_a_shell_reaches_the_cluster() -> None:
    cache, state = Cache(Path("/a b")), State(Path("/state"))
    assert exports(cache, state, {}) == "export KUBECONFIG=/state/kubeconfig PATH='/a b/bin':$PATH"
    behind = exports(cache, state, {"HTTPS_PROXY": PROXY})
    assert f",{NODE_ADDRESS}," in behind.partition(" NO_PROXY=")[2]


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"])
def test_any_name_of_a_package_mirror_serves_pip_and_uv(name: str) -> None:
    mirror = "http://127.0.0.1:8/simple"
    assert package_arguments({name: mirror}) == {"PIP_INDEX_URL": mirror, "UV_INDEX_URL": mirror}
    script = "echo $UV_DEFAULT_INDEX $PIP_INDEX_URL"
    said = subprocess.run(
        ["make", "-s", "--eval", f"tell:\n\t@{script.replace('$', '$$')}", "tell"],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], name: mirror},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == [mirror, mirror]


def test_without_a_mirror_the_defaults_hold() -> None:
    assert package_arguments({"UV_NATIVE_TLS": "1", "PIP_INDEX_URL": ""}) == {"UV_NATIVE_TLS": "1"}
