"""Fixtures that give tests a real cluster: a control plane of their own, or the whole node.

Import them in a conftest.py: `from tests.support.cluster import control_plane, node_cluster  # noqa: F401`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pytest

from yuan2_local import cluster, images, volumes
from yuan2_local.client import Client
from yuan2_local.command import exclusive, run, wait_until
from yuan2_local.errors import ClusterError
from yuan2_local.gobuild import go_command
from yuan2_local.node import set_gpus
from yuan2_local.paths import (
    REPOSITORY,
    Cache,
    State,
    cache_from,
    control_plane_state,
    is_foreign,
    node_state,
)
from yuan2_local.proxies import around_proxy

CRDS = REPOSITORY / "crds"
_CRDS_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass(frozen=True)
class TestCluster:
    """A running cluster, as tests use it."""

    __test__ = False

    cache: Cache
    state: State
    kubeconfig: Path

    def kubectl(self, *words: str, input: str | None = None) -> str:  # noqa: A002  (subprocess' own name)
        """Run kubectl as the administrator and return its output; ClusterError with its words if it fails."""
        environ = {**os.environ, **around_proxy(os.environ), "KUBECONFIG": str(self.kubeconfig)}
        return run([self.cache.binaries / "kubectl", *words], environ=environ, stdin=input)

    @property
    def client(self) -> Client:
        """An administrator's client for raw paths (local clusters only)."""
        return cluster.running(self.state).client()

    @cached_property
    def images(self) -> Mapping[str, str]:
        """References of the images train, serve and operator, built from this tree when that is needed."""
        return images.build(self.cache, images.DEFAULT, os.environ)

    def image(self, name: str) -> str:
        """Reference of one image: train, serve, operator, or a base: base, python."""
        return images.build(self.cache, [name], os.environ)[name]

    def volume(self, claim: str, size: str = "2Gi", tmpfs: bool = False) -> Path:
        """Make the volume for NAMESPACE/CLAIM before the claim exists; returns the directory behind it."""
        return volumes.create_volume(self.client, self.state, claim, size, tmpfs)

    def volume_path(self, claim: str) -> Path:
        """The directory behind NAMESPACE/CLAIM."""
        return volumes.directory(self.state, *volumes.parse_claim(claim))

    def set_gpus(self, count: int) -> None:
        """Make the node say that it has `count` GPUs."""
        set_gpus(self.client, count)


def _require_go() -> None:
    try:
        go_command()
    except ClusterError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A control plane without a node, of this test session alone, with the CRDs installed."""
    _require_go()
    if shutil.which("openssl") is None:
        pytest.skip("openssl: not found; install the package openssl")
    with running_control_plane(f"test-{os.getpid()}") as made:
        yield made


@contextlib.contextmanager
def running_control_plane(name: str) -> Iterator[TestCluster]:
    """A control plane without a node, with the CRDs installed, for the length of the block."""
    cache = cache_from(os.environ)
    state = control_plane_state(cache, name)
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.down, cache, state)
        cluster.up(cache, state, with_node=False)
        made = TestCluster(cache, state, state.kubeconfig)
        _install_crds(made)
        yield made


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[TestCluster]:
    """The whole one-node cluster: the one that runs, else one that goes with its last user.

    With KUBECONFIG naming another cluster, that one.
    """
    cache, state = cache_from(os.environ), node_state(os.environ)
    if is_foreign(os.environ):
        yield TestCluster(cache, state, Path(os.environ["KUBECONFIG"]))
        return
    _require_go()
    if os.geteuid() != 0:
        pytest.skip("the one-node cluster needs root")
    with running_node(cache, state) as made:
        yield made


@contextlib.contextmanager
def running_node(cache: Cache, state: State) -> Iterator[TestCluster]:
    """The node that runs, healed, or one that is started now and removed by its last user.

    Several processes of one machine may use it at once: each holds a lock that can be shared for as long.
    """
    turn, using = cache.locks / "node-turn.lock", cache.locks / "node-users.lock"
    turn.parent.mkdir(parents=True, exist_ok=True)
    with using.open("a+") as handle:
        with exclusive(turn):
            if _alone(handle):
                handle.truncate(0)
                handle.write("there" if cluster.load(state) is not None else "ours")
                handle.flush()
            fcntl.flock(handle, fcntl.LOCK_SH)
            cluster.up(cache, state, with_node=True)
        try:
            yield TestCluster(cache, state, state.kubeconfig)
        finally:
            with exclusive(turn):
                if _alone(handle) and using.read_text() == "ours":
                    cluster.down(cache, state)


def _alone(handle: IO[str]) -> bool:
    """Whether nobody else holds the lock; it is then held alone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _install_crds(made: TestCluster) -> None:
    if any(CRDS.glob("*.yaml")):
        made.kubectl("apply", "--server-side", "-k", str(CRDS))
        await_crds(made)


def await_crds(made: TestCluster) -> None:
    """Wait until the API server serves every CRD; `kubectl wait` fails on one that has no conditions yet."""
    wait_until("the CRDs", lambda: all(map(_established, made.client.get(_CRDS_PATH)["items"])), 30)


def _established(crd: Mapping[str, Any]) -> bool:
    conditions = (crd.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)
