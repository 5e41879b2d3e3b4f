"""Giving back the disk of images that nothing names any more: gigabytes whenever a lock file changes."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from .command import run
from .gobuild import ensure_binaries
from .paths import Cache, State
from .registry import NAME as REGISTRY
from .registry import has_image

_REPOSITORIES = "docker/registry/v2/repositories"


def stale_tags(registry: Path, keep: Collection[str]) -> list[Path]:
    """Folders of tags in the registry's storage, of images called REPOSITORY:TAG, that are not in `keep`."""
    repositories = registry / _REPOSITORIES
    return [
        path
        for path in sorted(repositories.glob("*/*/_manifests/tags/*"))
        if f"{path.parents[2].relative_to(repositories).as_posix()}:{path.name}" not in keep
    ]


def prune_registry(cache: Cache, keep: Collection[str]) -> None:
    """Remove every tag but those in `keep` from the loopback registry, and the blobs that only they used.

    Nothing may be pushed meanwhile.
    """
    stale = stale_tags(cache.registry, keep)
    if not stale:
        return
    for path in stale:
        shutil.rmtree(path)
    binary = ensure_binaries(cache, [REGISTRY])[REGISTRY]
    run([binary, "garbage-collect", "-m", "-q", State(cache.registry_state).root / "config.yaml"])


def gone_images(references: Iterable[str], registry: str) -> list[str]:
    """Those `references` of a node that the loopback registry at `registry` has no more."""
    gone = []
    for reference in references:
        repository, _, tag = reference.removeprefix(f"{registry}/").rpartition(":")
        if reference.startswith(f"{registry}/yuan2/") and not has_image(registry, repository, tag):
            gone.append(reference)
    return gone


def prune_node(state: State, registry: str) -> None:
    """Remove images from containerd that the loopback registry has no more."""
    ctr = ["ctr", "--address", str(state.containerd_socket), "-n", "k8s.io", "images"]
    gone = gone_images(run([*ctr, "ls", "-q"]).split(), registry)
    if gone:
        run([*ctr, "rm", "--sync", *gone])
