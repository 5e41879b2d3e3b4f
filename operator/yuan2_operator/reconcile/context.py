"""What every pass needs, made once at the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

from pydantic import ValidationError

from yuan2_operator.api.schema import Status
from yuan2_operator.apply import Applier, key_of
from yuan2_operator.cache import Cache, Object
from yuan2_operator.client import EVENTS, ApiError, Client, Conflict, Resource
from yuan2_operator.config import Settings
from yuan2_operator.observe import Observer
from yuan2_operator.plan.owner import Owner
from yuan2_operator.reconcile.polling import Poller
from yuan2_operator.status.events import Event, event_manifest
from yuan2_operator.status.patch import merge_patch

logger = logging.getLogger(__name__)


S = TypeVar("S", bound=Status)


def utc_now() -> datetime:
    """The time."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Context:
    """The edges of the program, and the clock."""

    settings: Settings
    client: Client
    cache: Cache
    applier: Applier
    observer: Observer
    poller: Poller
    instance: str
    """Name of this process in events."""
    clock: Callable[[], datetime] = utc_now

    async def write_status(self, resource: Resource, owner: Owner, before: Object, after: Object) -> None:
        """Write what has changed between two statuses; a no-op if nothing has."""
        patch = merge_patch(before, after)
        if not patch:
            return
        written = await self.client.patch_status(resource, owner.namespace, owner.name, patch, owner.version)
        self.cache.remember(resource.plural, key_of(owner), written)

    async def tell(self, owner: Owner, events: Iterable[Event]) -> None:
        """Post events; they are a courtesy, so a refusal is only logged."""
        for event in events:
            logger.info("%s %s/%s: %s: %s", owner.kind, owner.namespace, owner.name, event.reason, event.note)
            manifest = event_manifest(owner, event, self.clock(), self.instance)
            try:
                await self.client.create(EVENTS, owner.namespace, manifest)
            except Conflict:
                continue
            except ApiError as error:
                logger.warning("event %s of %s/%s: %s", event.reason, owner.namespace, owner.name, error)


def read_status(model: type[S], body: Object) -> tuple[S, Object]:
    """The status of a resource, and the object that a patch of it starts from.

    A status that cannot be read (another version wrote it) counts as none, and its fields are overwritten.
    """
    raw: Object = body.get("status") or {}
    try:
        status = model.model_validate(raw)
    except ValidationError as error:
        logger.warning("%s: status cannot be read and is made anew: %s", body["metadata"]["name"], error)
        return model(), raw
    return status, status.to_api()
