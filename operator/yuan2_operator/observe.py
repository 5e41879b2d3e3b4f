"""Looking things up that no watch shows: references, progress, and Jobs that the cache does not know."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from yuan2_core.contract import PORT_PROGRESS, Progress
from yuan2_operator.cache import Object
from yuan2_operator.client import CLAIMS, CONFIG_MAPS, JOBS, SECRETS, ApiError, Client, NotFound
from yuan2_operator.config import Settings
from yuan2_operator.plan.references import Missing, Reference, ReferenceKind

logger = logging.getLogger(__name__)

PROGRESS_TIMEOUT = 2.0
PROGRESS_LIMIT = 64 * 1024
"""Bytes of an answer that are read at most: a pod's answer is not trusted."""

_RESOURCES = {"PersistentVolumeClaim": CLAIMS, "Secret": SECRETS, "ConfigMap": CONFIG_MAPS}


@dataclass(frozen=True)
class Observer:
    """Reads from the API server and from training pods."""

    client: Client
    http: aiohttp.ClientSession
    through_proxy: bool
    """Progress is read through the API server, since pod IPs cannot be reached from here."""

    async def missing(self, namespace: str, references: Iterable[Reference]) -> list[Missing]:
        """Those of `references` that are not there; each object is asked for once."""
        wanted = list(references)
        objects = {(reference.kind, reference.name): reference for reference in wanted}
        found = await asyncio.gather(*(self._find(namespace, entry) for entry in objects.values()))
        existing = dict(zip(objects, found, strict=True))
        return [gap for reference in wanted if (gap := _gap(reference, existing)) is not None]

    async def job(self, namespace: str, name: str) -> Object | None:
        """A Job as it is now, or None."""
        try:
            return await self.client.get(JOBS, namespace, name)
        except NotFound:
            return None

    async def progress(self, namespace: str, pod: str, ip: str | None) -> Progress | None:
        """What a training pod says of its progress, or None when it does not answer in time or in form."""
        try:
            return Progress.model_validate_json(await self._progress(namespace, pod, ip))
        except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValidationError) as error:
            logger.debug("no progress from pod %s/%s: %s", namespace, pod, error)
            return None

    async def _progress(self, namespace: str, pod: str, ip: str | None) -> bytes:
        if self.through_proxy or ip is None:
            return await self.client.proxy_pod(namespace, pod, PORT_PROGRESS, "/progress", PROGRESS_TIMEOUT)
        host = f"[{ip}]" if ":" in ip else ip
        timeout = aiohttp.ClientTimeout(total=PROGRESS_TIMEOUT)
        async with self.http.get(f"http://{host}:{PORT_PROGRESS}/progress", timeout=timeout) as response:
            response.raise_for_status()
            return await response.content.read(PROGRESS_LIMIT)

    async def _find(self, namespace: str, reference: Reference) -> Object | None:
        try:
            return await self.client.get(_RESOURCES[reference.kind], namespace, reference.name)
        except NotFound:
            return None


def goes_through_proxy(settings: Settings) -> bool:
    """Whether progress is read through the API server: outside a cluster, unless the settings say
    otherwise."""
    if settings.progress_via != "auto":
        return settings.progress_via == "proxy"
    return "KUBERNETES_SERVICE_HOST" not in os.environ


def _gap(reference: Reference, existing: Mapping[tuple[ReferenceKind, str], Object | None]) -> Missing | None:
    found = existing[(reference.kind, reference.name)]
    if found is None:
        return Missing(reference)
    keys = {**(found.get("data") or {}), **(found.get("binaryData") or {})}
    return (
        Missing(reference, key_only=True) if reference.key is not None and reference.key not in keys else None
    )
