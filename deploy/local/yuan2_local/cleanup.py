"""Removing what pods and the node's programs leave on the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import network, node, registry, rules
from .command import exclusive_if_free, note, run, wait_until
from .errors import ClusterError
from .gobuild import PROGRAMS, binary_path
from .mounts import unmount_below
from .paths import Cache, State
from .processes import Processes

# Folders outside the state that the kubelet, containerd and the CNI plugins insist on.
_HOST_DIRECTORIES = (
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/run/containerd",
    "/run/netns",
    "/var/log/containers",
    "/var/log/pods",
)
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_POD_CGROUPS = ("kubepods", "k8s.io")
_SOCKET_SECONDS = 30.0


@dataclass(frozen=True)
class Host:
    """The machine before the cluster, to tell what `down` may remove and what it puts back."""

    forwarding: str
    nft_tables: list[str]
    absent_directories: list[str]


def observe_host() -> Host:
    """Look at the machine now."""
    absent = [path for path in _HOST_DIRECTORIES if not Path(path).exists()]
    return Host(network.FORWARDING.read_text().strip(), rules.nft_tables(), absent)


def await_containerd(state: State, processes: Processes) -> None:
    """Wait until containerd listens."""

    def listening() -> bool:
        processes.check(["containerd"])
        return state.containerd_socket.exists()

    wait_until("containerd", listening, _SOCKET_SECONDS, interval=0.05)


def sweep_containers(state: State, crisweep: Path) -> None:
    """Stop and remove every pod that containerd has."""
    run([crisweep, "-endpoint", f"unix://{state.containerd_socket}"])


def remove_pods(cache: Cache, state: State, processes: Processes) -> None:
    """Remove every pod the way it was made; containerd is started again for it when it has died.

    What the runtime cannot remove is said and left to `remove_traces`.
    """
    crisweep = binary_path(cache, PROGRAMS["crisweep"])
    if not (state.config / "containerd.toml").exists() or not crisweep.exists():
        return
    processes.stop("provisioner")
    processes.stop("kubelet")
    try:
        processes.ensure("containerd", node.containerd_argv(state))
        await_containerd(state, processes)
        sweep_containers(state, crisweep)
    except ClusterError as error:
        note(f"down: {error}")


def remove_traces(cache: Cache, state: State, before: Host) -> None:
    """Shims, mounts, control groups, network, log links, and folders that were not there before."""
    for pid in shim_pids(state.containerd_socket):
        _kill_with_children(pid)
    unmount_below(state.root, cache.containerd)
    _end_image_service(cache)
    for name in _POD_CGROUPS:
        _remove_cgroups(name)
    network.remove_bridge()
    rules.remove_rules(before.nft_tables)
    _remove_log_links(state)
    for path in before.absent_directories:
        unmount_below(Path(path))
        shutil.rmtree(path, ignore_errors=True)
    network.FORWARDING.write_text(before.forwarding)


def _end_image_service(cache: Cache) -> None:
    with exclusive_if_free(cache.images_lock) as free:
        if not free:
            note("down: images are being built; the registry stays until `cluster.py registry-down`")
            return
        unmount_below(cache.buildah)
        registry.stop_registry(cache)


def shim_pids(socket: Path) -> list[int]:
    """Processes that are shims of the containerd at `socket`, known by their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "containerd-shim" in words[0] and str(socket) in words:
                found.append(int(entry.name))
    return found


def _kill_with_children(pid: int) -> None:
    for child in [*_descendants(pid), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _descendants(int(word))
            yield int(word)


def _remove_cgroups(name: str) -> None:
    roots = [_CGROUP_ROOT / name, *_CGROUP_ROOT.glob(f"*/{name}")]
    for root in roots:
        if root.is_dir():
            _remove_cgroup_tree(root)


def _remove_cgroup_tree(root: Path) -> None:
    # A control group can be removed only bottom up, and a moment after its last process has ended.
    for _ in range(20):
        for folder, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        if not root.exists():
            return
        time.sleep(0.1)
    note(f"down: control group {root} is still in use and stays")


def _remove_log_links(state: State) -> None:
    folder = Path("/var/log/containers")
    if folder.is_dir():
        for link in folder.iterdir():
            if link.is_symlink() and str(link.readlink()).startswith(f"{state.root}/"):
                link.unlink()
