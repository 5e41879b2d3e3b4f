"""Bringing children to what a plan says: create, repair, delete; nothing is written that is as it should
be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yuan2_operator.cache import Cache, Object
from yuan2_operator.client import CHILD_RESOURCES, Client, Conflict, NotFound, Resource, child_resource
from yuan2_operator.constants import LABEL_FINETUNE, LABEL_SERVICE
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.quantity import parse_quantity
from yuan2_operator.queue import Key

logger = logging.getLogger(__name__)


class Occupied(Exception):  # noqa: N818 - a state of the cluster, not a fault
    """The name of a child is taken by an object that is not ours."""


@dataclass(frozen=True)
class Applier:
    """Writes children of custom resources."""

    client: Client
    cache: Cache

    async def ensure(self, owner: Owner, manifests: Sequence[Object]) -> None:
        """Have every manifest exist as it is, in order.

        Raises `Occupied` when a name belongs to somebody else, and the client's errors.
        """
        for manifest in manifests:
            await self._ensure(owner, manifest)

    async def remove(self, owner: Owner, kind: str, name: str, now: str, *, wait: bool = False) -> None:
        """Delete one child; with `wait` it stays visible until everything that it owns is gone."""
        resource = CHILD_RESOURCES[kind]
        live = self.cache.one(resource.plural, key_of(owner), name)
        if live is not None and (not owned(live, owner) or "deletionTimestamp" in live["metadata"]):
            return
        propagation = "Foreground" if wait else "Background"
        await self.client.delete(resource, owner.namespace, name, propagation=propagation)
        logger.info("%s %s/%s: deleted %s %s", owner.kind, owner.namespace, owner.name, kind, name)
        if live is not None:
            self.cache.remember_deletion(resource.plural, key_of(owner), live, now)

    async def _ensure(self, owner: Owner, manifest: Object) -> None:
        resource, name = child_resource(manifest), manifest["metadata"]["name"]
        live = self.cache.one(resource.plural, key_of(owner), name)
        if live is None:
            applied = await self._create(owner, resource, manifest)
        else:
            _claim(live, owner)
            if "deletionTimestamp" in live["metadata"] or create_only(manifest):
                return
            reason = difference(manifest, live)
            if reason is None:
                return
            logger.info(
                "%s/%s: %s %s differs: %s", owner.namespace, owner.name, manifest["kind"], name, reason
            )
            applied = await self.client.apply(manifest, force=True)
        self.cache.remember(resource.plural, key_of(owner), applied)

    async def _create(self, owner: Owner, resource: Resource, manifest: Object) -> Object:
        """Create a child that the cache does not know; one that exists after all must be ours."""
        namespace, name = owner.namespace, manifest["metadata"]["name"]
        if create_only(manifest):
            try:
                return await self.client.create(resource, namespace, manifest)
            except Conflict:
                return _claim(await self.client.get(resource, namespace, name), owner)
        try:
            _claim(await self.client.get(resource, namespace, name), owner)
        except NotFound:
            logger.debug("%s/%s: %s %s is new", namespace, owner.name, manifest["kind"], name)
        # Its later versions drop fields, which only the manager that applied them can do: so it is applied
        # from
        # the beginning.
        return await self.client.apply(manifest, force=True)


def key_of(owner: Owner) -> Key:
    """The key of a custom resource."""
    return Key(owner.kind, owner.namespace, owner.name)


def create_only(manifest: Mapping[str, Any]) -> bool:
    """Objects whose content never changes: a Job's template, a ConfigMap that says so."""
    return manifest["kind"] == "Job" or bool(manifest.get("immutable"))


def owned(live: Mapping[str, Any], owner: Owner) -> bool:
    """Whether an object belongs to this very custom resource, not to an earlier one of its name."""
    return any(reference["uid"] == owner.uid for reference in live["metadata"].get("ownerReferences", ()))


def difference(wanted: Mapping[str, Any], live: Mapping[str, Any]) -> str | None:
    """Where `live` is not what `wanted` says, as `path: value, not value`; None when everything wanted is
    there.

    What the API server added (defaults, status) is no difference; neither is another spelling of a quantity.
    """
    return _difference(wanted, live, "")


def _difference(wanted: Any, live: Any, path: str) -> str | None:
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        found = (_difference(value, live.get(key), f"{path}.{key}") for key, value in wanted.items())
        return next((text for text in found if text is not None), None)
    if isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        found = (
            _difference(*pair, f"{path}[{index}]")
            for index, pair in enumerate(zip(wanted, live, strict=True))
        )
        return next((text for text in found if text is not None), None)
    if wanted == live or _same_amount(wanted, live) or (live is None and wanted in ({}, [], None, "")):
        return None
    return f"{path.lstrip('.')}: {live!r}, not {wanted!r}"


def _same_amount(wanted: Any, live: Any) -> bool:
    if not isinstance(wanted, str | int) or not isinstance(live, str | int):
        return False
    try:
        return parse_quantity(wanted) == parse_quantity(live)
    except ValueError:
        return False


def _claim(live: Object, owner: Owner) -> Object:
    """`live` if it is ours to change."""
    if owned(live, owner):
        return live
    metadata, kind = live["metadata"], live.get("kind", "object")
    labels = metadata.get("labels", {})
    if (
        owner.name in (labels.get(LABEL_FINETUNE), labels.get(LABEL_SERVICE))
        and "ownerReferences" in metadata
    ):
        raise Occupied(
            f"{kind} {metadata['name']} of an earlier {owner.kind} {owner.name} is still being removed"
        )
    raise Occupied(
        f"{kind} {metadata['name']} exists and does not belong to {owner.kind} {owner.name}: "
        "rename or delete it, or give the resource another name"
    )
