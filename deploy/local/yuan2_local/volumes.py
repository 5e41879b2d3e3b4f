"""Persistent volumes that are directories of this machine, writable by any user of a pod.

hostPath volumes ignore fsGroup, so the directories are mode 0777: pods run as non-root users.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from .client import Client
from .command import run
from .errors import ClusterError
from .mounts import unmount_below
from .objects import PROVISIONER, STORAGE_CLASS
from .paths import State

_CLAIM = re.compile(r"([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)/([a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?)")
_SIZE = re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTORS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", start=1)}
_ACCESS_MODES = ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]


def parse_claim(text: str) -> tuple[str, str]:
    """(namespace, claim) of "NAMESPACE/CLAIM"; ClusterError otherwise."""
    match = _CLAIM.fullmatch(text)
    if match is None:
        raise ClusterError(f"claim {text!r}: write NAMESPACE/CLAIM, for example default/models")
    return match[1], match[2]


def parse_size(text: str) -> int:
    """Bytes of a quantity such as 2Gi; ClusterError otherwise."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ClusterError(f"size {text!r}: write a quantity such as 512Mi or 2Gi")
    unit = match[2] or ""
    return int(float(text.removesuffix(unit) if unit else text) * _FACTORS[unit])


def volume_name(namespace: str, claim: str) -> str:
    """Name of the volume behind a claim."""
    return f"local-{namespace}-{claim}"


def directory(state: State, namespace: str, claim: str) -> Path:
    """The directory behind a claim."""
    return state.volumes / namespace / claim


def persistent_volume(path: Path, namespace: str, claim: str, size: str, uid: str = "") -> dict[str, Any]:
    """A volume reserved for one claim; with the `uid` of a claim that exists already it binds at once."""
    reserved = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": namespace, "name": claim}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": volume_name(namespace, claim),
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "capacity": {"storage": size},
            "accessModes": _ACCESS_MODES,
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": STORAGE_CLASS,
            "claimRef": {**reserved, "uid": uid} if uid else reserved,
            "hostPath": {"path": str(path), "type": "Directory"},
        },
    }


def make_directory(path: Path) -> None:
    """Create a directory that any user can write, whatever our umask."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o777)


def create_volume(client: Client, state: State, claim: str, size: str, tmpfs: bool = False) -> Path:
    """Create the volume for NAMESPACE/CLAIM before the claim exists, and return its directory.

    With `tmpfs` the directory really holds no more than `size`. A volume that is there already is kept.
    """
    namespace, name = parse_claim(claim)
    path = directory(state, namespace, name)
    limit = parse_size(size)
    make_directory(path)
    if tmpfs and not path.is_mount():
        run(["mount", "-t", "tmpfs", "-o", f"size={limit},mode=0777", f"yuan2-{name}", path])
    client.create("/api/v1/persistentvolumes", persistent_volume(path, namespace, name, size))
    return path


def remove_directory(state: State, path: Path) -> None:
    """Remove a volume's directory, with a tmpfs on it; only below the state's own volumes."""
    if state.volumes not in path.parents:
        raise ClusterError(f"volume path {path}: not below {state.volumes}, so it is not removed")
    unmount_below(path)
    shutil.rmtree(path, ignore_errors=True)
