"""What the watches have shown, and what our own writes have changed since.

A watch lags behind a write by some milliseconds. A pass that read only what the watch has shown would see
its own objects missing and its own status unwritten; so what the API server answered to a write stands in
for the watched object until the watch has caught up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from yuan2_operator.queue import Key

Object = dict[str, Any]
Index = Mapping[Key, Collection[Object]]
"""Objects by the custom resource that they are, or belong to."""

DEPARTED_KEPT = 4096
"""Objects whose end is remembered, since the answer to their deletion may come after the watch's word."""
POD_FIELDS = ("nodeName", "containers")
CONTAINER_FIELDS = ("name", "image", "resources")
JOB_FIELDS = ("parallelism", "suspend")


def slim(obj: Mapping[str, Any]) -> Object:
    """A copy with only what decisions are made of: thousands of these are kept in memory."""
    metadata = {
        key: value for key, value in obj["metadata"].items() if key not in ("managedFields", "generateName")
    }
    result = {**{key: obj[key] for key in obj if key != "metadata"}, "metadata": metadata}
    kind = obj.get("kind")
    if kind == "Pod":
        spec = obj.get("spec", {})
        result["spec"] = {key: spec[key] for key in POD_FIELDS if key in spec}
        result["spec"]["containers"] = [
            {key: container[key] for key in CONTAINER_FIELDS if key in container}
            for container in spec.get("containers", ())
        ]
        result["spec"]["volumes"] = [
            {"persistentVolumeClaim": {"claimName": volume["persistentVolumeClaim"]["claimName"]}}
            for volume in spec.get("volumes", ())
            if "persistentVolumeClaim" in volume
        ]
    elif kind == "Job":
        result["spec"] = {key: value for key, value in obj.get("spec", {}).items() if key in JOB_FIELDS}
    return result


class Cache:
    """Watched objects by kind (its plural) and owner, newest version of each."""

    def __init__(self, indices: Mapping[str, Index]) -> None:
        self._indices = indices
        self._written: dict[tuple[str, Key], dict[str, Object]] = {}
        self._gone: set[str] = set()
        self._departed: dict[str, None] = {}

    def of(self, plural: str, key: Key) -> list[Object]:
        """Objects of one kind that belong to a custom resource, or are it; by name."""
        found = {
            obj["metadata"]["name"]: obj
            # Kinds of other projects are not watched: they may not be installed.
            for obj in self._indices.get(plural, {}).get(key, ())
            if obj["metadata"]["uid"] not in self._gone
        }
        written = self._written.get((plural, key), {})
        for name, obj in list(written.items()):
            caught_up = name in found and _version(found[name]) >= _version(obj)
            if caught_up or obj["metadata"].get("uid") in self._gone:
                self._drop(plural, key, name)
            else:
                found[name] = obj
        return [found[name] for name in sorted(found)]

    def one(self, plural: str, key: Key, name: str) -> Object | None:
        """One of them."""
        return next((obj for obj in self.of(plural, key) if obj["metadata"]["name"] == name), None)

    def itself(self, plural: str, key: Key) -> Object | None:
        """The custom resource."""
        return self.one(plural, key, key.name)

    def keys(self, plural: str) -> list[Key]:
        """Every custom resource that has an object of this kind."""
        return list(self._indices[plural])

    def remember(self, plural: str, key: Key, obj: Mapping[str, Any]) -> None:
        """Take in what the API server answered to a write, unless a watch has told its end meanwhile."""
        if obj["metadata"].get("uid") in self._departed:
            return
        self._written.setdefault((plural, key), {})[obj["metadata"]["name"]] = slim(obj)

    def remember_deletion(self, plural: str, key: Key, obj: Mapping[str, Any], now: str) -> None:
        """Take in that the deletion of `obj` was asked for at `now` (RFC 3339)."""
        metadata = {"deletionTimestamp": now, **obj["metadata"]}
        # One more than the version seen: the watch has caught up as soon as it shows a newer one.
        metadata["resourceVersion"] = str(_version(obj) + 1)
        self.remember(plural, key, {**obj, "metadata": metadata})

    def forget(self, plural: str, key: Key, name: str, uid: str) -> None:
        """An object is gone, the watch says."""
        self._gone.discard(uid)
        self._departed[uid] = None
        if len(self._departed) > DEPARTED_KEPT:
            del self._departed[next(iter(self._departed))]
        written = self._written.get((plural, key), {}).get(name)
        if written is not None and written["metadata"]["uid"] == uid:
            self._drop(plural, key, name)

    def uids(self, plural: str, namespace: str | None) -> set[str]:
        """Identifiers of all watched objects of one kind, of one namespace or of all."""
        keys = [key for key in self.keys(plural) if namespace in (None, key.namespace)]
        return {obj["metadata"]["uid"] for key in keys for obj in self._indices[plural].get(key, ())}

    def hide(self, uids: Collection[str]) -> None:
        """Show these no more: they are gone, though no watch has told so.

        A watch that had to begin anew does not tell what vanished in between.
        """
        self._gone.update(uids)

    def _drop(self, plural: str, key: Key, name: str) -> None:
        entries = self._written[(plural, key)]
        del entries[name]
        if not entries:
            del self._written[(plural, key)]


def _version(obj: Mapping[str, Any]) -> int:
    """resourceVersion as a number: it is one in every Kubernetes, and since 1.35 officially so."""
    version = str(obj["metadata"].get("resourceVersion", "0"))
    return int(version) if version.isdigit() else 0
