"""One of several operators works: the one that holds a Lease of coordination.k8s.io.

The others watch, so that their caches are warm, and take the Lease when it is given back or has not been
renewed for its duration. As client-go does it, that is measured by one's own clock, from when a renewal was
last seen: the clocks of two nodes are never compared. A leader that could not renew in time ends itself; what
it may still have under way is harmless, since a status is written only on the version that it was decided on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from yuan2_operator.client import LEASES, ApiError, Client, Conflict, NotFound
from yuan2_operator.constants import FIELD_MANAGER
from yuan2_operator.metrics import LEADER

logger = logging.getLogger(__name__)

LEASE_SECONDS = 10
"""A Lease that was not renewed for so long is taken."""
RENEW_SECONDS = 2.0
"""Between two renewals, and between two looks of those that wait."""
GIVE_UP_SECONDS = 7.0
"""A leader whose last renewal is older stops, before another one may take the Lease."""

Lease = dict[str, Any]


class Lost(Exception):  # noqa: N818 - the end of this process, not a fault
    """The Lease belongs to somebody else, or could not be renewed."""


@dataclass(frozen=True)
class Sighting:
    """A Lease as it was last seen to change, and when by one's own clock."""

    lease: Lease
    at: float

    def next(self, lease: Lease, now: float) -> Sighting:
        """After another look."""
        return self if lease["spec"] == self.lease["spec"] else Sighting(lease, now)


def may_take(seen: Sighting, identity: str, now: float) -> bool:
    """Whether `identity` may write itself into a Lease that was seen so."""
    holder = seen.lease["spec"].get("holderIdentity")
    duration = seen.lease["spec"].get("leaseDurationSeconds", LEASE_SECONDS)
    return not holder or holder == identity or now - seen.at > duration


def taken(lease: Lease, identity: str, now: datetime) -> Lease:
    """The Lease with `identity` as its holder, renewed now."""
    spec, moment = dict(lease.get("spec", {})), now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if spec.get("holderIdentity") != identity:
        spec |= {"acquireTime": moment, "leaseTransitions": spec.get("leaseTransitions", -1) + 1}
    spec |= {"holderIdentity": identity, "renewTime": moment, "leaseDurationSeconds": LEASE_SECONDS}
    return {**lease, "spec": spec}


@dataclass
class Leadership:
    """Takes the Lease, keeps it, and gives it back."""

    client: Client
    namespace: str
    identity: str
    clock: Callable[[], datetime]
    leads: asyncio.Event
    """Set from the moment that this process holds the Lease."""
    name: str = FIELD_MANAGER
    _held: Lease | None = None
    _seen: Sighting | None = None

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            Lost: the Lease was held and is not any more.
        """
        renewed = time.monotonic()
        while True:
            try:
                if await self._step():
                    renewed = time.monotonic()
            except Conflict:
                # Somebody else has written it.
                self._held = None
            except ApiError as error:
                logger.warning("lease %s/%s: %s", self.namespace, self.name, error)
            if self.leads.is_set() and (self._held is None or time.monotonic() - renewed > GIVE_UP_SECONDS):
                raise Lost(f"lease {self.namespace}/{self.name} was not renewed in time, or was taken")
            await asyncio.sleep(RENEW_SECONDS)

    async def give_back(self) -> None:
        """Let the next one lead at once."""
        if self._held is None:
            return
        lease, self._held = self._held, None
        LEADER.set(0)
        try:
            await self.client.replace(LEASES, {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except ApiError as error:
            logger.warning("lease %s/%s is not given back: %s", self.namespace, self.name, error)

    async def _step(self) -> bool:
        """Renew, take, or look; whether this process holds the Lease now."""
        if self._held is not None:
            self._held = await self.client.replace(LEASES, taken(self._held, self.identity, self.clock()))
            return True
        lease = await self._read()
        now = time.monotonic()
        self._seen = Sighting(lease, now) if self._seen is None else self._seen.next(lease, now)
        if not may_take(self._seen, self.identity, now):
            return False
        self._held = await self.client.replace(LEASES, taken(lease, self.identity, self.clock()))
        logger.info("%s leads", self.identity)
        LEADER.set(1)
        self.leads.set()
        return True

    async def _read(self) -> Lease:
        try:
            return await self.client.get(LEASES, self.namespace, self.name)
        except NotFound:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name, "namespace": self.namespace},
                "spec": {},
            }
            return await self.client.create(LEASES, self.namespace, body)
