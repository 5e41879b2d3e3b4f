"""Which cluster the demo talks to: the local one that it starts, or one that KUBECONFIG and REGISTRY name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yuan2_local import cluster, images
from yuan2_local.errors import ClusterError
from yuan2_local.paths import cache_from, is_foreign, node_state

from .errors import DemoError


@dataclass(frozen=True)
class Target:
    """A cluster and how to reach it."""

    kubeconfig: Path
    local: bool
    """Started and removed by the demo."""


def choose(environ: Mapping[str, str]) -> Target:
    """The cluster that the environment asks for.

    A KUBECONFIG that is the local cluster's own (the demo tells users to export it) means the local one.
    Raises DemoError when KUBECONFIG is not one file.
    """
    if not is_foreign(environ):
        return Target(node_state(environ).kubeconfig, local=True)
    named = environ["KUBECONFIG"]
    if os.pathsep in named or not Path(named).is_file():
        raise DemoError(f"KUBECONFIG={named}: name one existing file, or unset it to use a local cluster")
    return Target(Path(named).absolute(), local=False)


def start(target: Target, environ: Mapping[str, str]) -> None:
    """Bring the local cluster up, or leave a foreign one as it is. Raises DemoError."""
    if target.local:
        with _sentences():
            cluster.up(cache_from(environ), node_state(environ), with_node=True)


def stop(environ: Mapping[str, str]) -> None:
    """Remove every trace of the local cluster but the cache. Raises DemoError."""
    with _sentences():
        cluster.down(cache_from(environ), node_state(environ))


def build_images(environ: Mapping[str, str]) -> dict[str, str]:
    """References of the images train, serve and operator, built where they are missing. Raises DemoError."""
    with _sentences():
        return images.build(cache_from(environ), images.DEFAULT, environ)


def find_kubectl(target: Target, environ: Mapping[str, str]) -> str:
    """The kubectl built with the local cluster, else the one on PATH. Raises DemoError when there is none."""
    built = cache_from(environ).binaries / "kubectl"
    found = str(built) if target.local and built.exists() else shutil.which("kubectl")
    if not found and built.exists():
        found = str(built)
    if not found:
        raise DemoError("kubectl: not found on PATH; install it, or unset KUBECONFIG to use a local cluster")
    return found


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except ClusterError as error:
        raise DemoError(str(error)) from error
