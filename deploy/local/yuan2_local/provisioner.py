"""The default storage class: every claim gets a directory of the node.

A level-driven loop: look at all claims and volumes, do what is missing, then watch until something changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import ApiError, Client
from .objects import PROVISIONER, STORAGE_CLASS
from .paths import State
from .volumes import directory, make_directory, persistent_volume, remove_directory, volume_name

# Also how long a released volume waits at most: its release is no event of a claim.
_WATCH_SECONDS = 5
_RETRY_SECONDS = 1.0
_CLAIMS = "/api/v1/persistentvolumeclaims"
_VOLUMES = "/api/v1/persistentvolumes"


@dataclass(frozen=True)
class Claim:
    """A claim that waits for a volume."""

    namespace: str
    name: str
    uid: str
    size: str


def claims_to_serve(claims: Iterable[Mapping[str, Any]], volumes: Iterable[str]) -> list[Claim]:
    """Pending claims of our class without a volume."""
    there = set(volumes)
    wanted = []
    for claim in claims:
        metadata, spec = claim["metadata"], claim["spec"]
        pending = claim["status"].get("phase") == "Pending" and not spec.get("volumeName")
        ours = spec.get("storageClassName") == STORAGE_CLASS and "deletionTimestamp" not in metadata
        if pending and ours and volume_name(metadata["namespace"], metadata["name"]) not in there:
            size = spec["resources"]["requests"]["storage"]
            wanted.append(Claim(metadata["namespace"], metadata["name"], metadata["uid"], size))
    return wanted


def volumes_to_remove(volumes: Iterable[Mapping[str, Any]]) -> list[tuple[str, Path]]:
    """(name, directory) of our volumes whose claim is gone."""
    return [
        (volume["metadata"]["name"], Path(volume["spec"]["hostPath"]["path"]))
        for volume in volumes
        if volume["metadata"].get("annotations", {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
        and volume["status"].get("phase") == "Released"
        and "deletionTimestamp" not in volume["metadata"]
    ]


def reconcile(client: Client, state: State) -> str:
    """Serve claims, remove released volumes; returns the claims' resource version to watch from."""
    volumes = client.get(_VOLUMES)["items"]
    for name, path in volumes_to_remove(volumes):
        remove_directory(state, path)
        client.delete(f"{_VOLUMES}/{name}")
    listed = client.get(_CLAIMS)
    for claim in claims_to_serve(listed["items"], (volume["metadata"]["name"] for volume in volumes)):
        path = directory(state, claim.namespace, claim.name)
        make_directory(path)
        body = persistent_volume(path, claim.namespace, claim.name, claim.size, claim.uid)
        client.create(_VOLUMES, body)
    return str(listed["metadata"]["resourceVersion"])


def serve(client: Client, state: State) -> None:
    """Run until killed."""
    while True:
        _pass(client, state)


def _pass(client: Client, state: State) -> None:
    try:
        version = reconcile(client, state)
        next(client.watch(f"{_CLAIMS}?resourceVersion={version}", _WATCH_SECONDS), None)
    except (OSError, ApiError, ValueError) as error:
        print(f"provisioner: {error}", flush=True)
        time.sleep(_RETRY_SECONDS)
