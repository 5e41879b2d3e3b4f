"""Looking things up that no watch shows: references, progress, and Jobs that the cache does not know."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from pydantic import ValidationError

from yuan2_core.contract import PORT_PROGRESS, PORT_STACKS, Progress
from yuan2_operator.cache import Object
from yuan2_operator.client import (
    CLAIMS,
    CONFIG_MAPS,
    JOBS,
    NODES,
    PODS,
    SECRETS,
    ApiError,
    Client,
    Forbidden,
    NotFound,
    TooLong,
    read_all,
)
from yuan2_operator.config import Settings
from yuan2_operator.plan.capacity import Demand, room
from yuan2_operator.plan.references import Missing, Reference, ReferenceKind

CENSUS_SECONDS = 60.0
KNOWN_SECONDS = 30.0
SEEN_KEPT = 4096
HOLDING = "status.phase!=Succeeded,status.phase!=Failed,spec.nodeName!="
"""Pods that hold a part of a node."""
PROGRESS_TIMEOUT = 2.0
PROGRESS_LIMIT = 64 * 1024
"""Bytes of an answer that are read at most: a pod's answer is not trusted."""

STACKS_TIMEOUT = 5.0
STACKS_LIMIT = 256 * 1024


@dataclass(frozen=True)
class Request:
    """A question to a pod."""

    port: int
    path: str
    timeout: float
    """Seconds for the whole answer."""
    limit: int
    """Bytes of an answer that are read at most."""


class Rank(Protocol):
    """A training pod, as far as it must be known to ask it."""

    @property
    def name(self) -> str: ...

    @property
    def index(self) -> int: ...

    @property
    def ip(self) -> str | None: ...


class Silent(Exception):  # noqa: N818 - says nothing of the pod's health
    """A training pod gave no answer that can be used; the text is a clause that says why."""


_RESOURCES = {"PersistentVolumeClaim": CLAIMS, "Secret": SECRETS, "ConfigMap": CONFIG_MAPS}


@dataclass
class Census:
    """Nodes and what holds a part of them, counted only while pods wait, and for all runs together."""

    at: float | None = None
    nodes: list[Object] = field(default_factory=list)
    pods: list[Object] = field(default_factory=list)


@dataclass(frozen=True)
class Observer:
    """Reads from the API server and from training pods."""

    client: Client
    http: aiohttp.ClientSession
    through_proxy: bool
    """Progress is read through the API server, since pod IPs cannot be reached from here."""
    census: Census = field(default_factory=Census)
    seen: dict[tuple[str, Reference], float] = field(default_factory=dict)
    """References that were there, and when."""

    async def missing(self, namespace: str, references: Iterable[Reference]) -> list[Missing]:
        """Those of `references` that are not there; each object is asked for once, and one that was there not
        again for `KNOWN_SECONDS`, however many passes there are."""
        wanted = [entry for entry in references if not self._known(namespace, entry)]
        objects = {(reference.kind, reference.name): reference for reference in wanted}
        found = await asyncio.gather(*(self._find(namespace, entry) for entry in objects.values()))
        existing = dict(zip(objects, found, strict=True))
        gaps = {reference: _gap(reference, existing) for reference in wanted}
        now = time.monotonic()
        if len(self.seen) > SEEN_KEPT:
            self.seen.clear()
        self.seen.update({(namespace, reference): now for reference, gap in gaps.items() if gap is None})
        return [gap for gap in gaps.values() if gap is not None]

    def _known(self, namespace: str, reference: Reference) -> bool:
        """It was there a moment ago."""
        at = self.seen.get((namespace, reference))
        if at is not None and time.monotonic() - at > KNOWN_SECONDS:
            del self.seen[(namespace, reference)]
            at = None
        return at is not None

    async def room(self, wanted: Demand) -> str | None:
        """How much room the nodes have, as of the last minute; None where the operator may not look."""
        if self.census.at is None or time.monotonic() - self.census.at > CENSUS_SECONDS:
            self.census.at = time.monotonic()
            try:
                self.census.nodes = await self.client.list_all(NODES, None)
                self.census.pods = await self.client.list_all(PODS, None, fields=HOLDING)
            except ApiError:
                self.census.nodes = []
        return room(wanted, self.census.nodes, self.census.pods) if self.census.nodes else None

    async def job(self, namespace: str, name: str) -> Object | None:
        """A Job as it is now, or None."""
        try:
            return await self.client.get(JOBS, namespace, name)
        except NotFound:
            return None

    async def progress(self, namespace: str, pod: str, ip: str | None) -> Progress:
        """What a training pod says of its progress; fields that this version does not know are ignored.

        Raises:
            Silent: it does not answer in time, or not in form. That says nothing about its training.
        """
        via = "through the API server" if self._proxied(ip) else f"on port {PORT_PROGRESS}"
        try:
            return Progress.read(await self._progress(namespace, pod, ip))
        except Forbidden as error:
            text = (
                f"the API server does not let the operator ask pod {pod} ({error}): grant `get` on pods/proxy"
            )
            raise Silent(text) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "its form"
            what = f"the answer of pod {pod} cannot be read ({where}: {first['msg']})"
            raise Silent(f"{what}: its image is of another version") from error
        except TooLong as error:
            raise Silent(f"the answer of pod {pod} is longer than {PROGRESS_LIMIT} bytes") from error
        except aiohttp.ClientResponseError as error:
            raise Silent(f"pod {pod} answers {via} with HTTP status {error.status}") from error
        except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise Silent(
                f"pod {pod} does not answer {via}: a NetworkPolicy or a firewall may be in the way"
            ) from error

    def _proxied(self, ip: str | None) -> bool:
        return self.through_proxy or ip is None

    async def stacks(self, namespace: str, pods: Iterable[Rank]) -> dict[str, str]:
        """Where the ranks of each pod are, or why it does not say, by the pod's name."""
        return dict(await asyncio.gather(*(self._stacks(namespace, pod) for pod in pods)))

    async def _stacks(self, namespace: str, pod: Rank) -> tuple[str, str]:
        port = PORT_PROGRESS if pod.index == 0 else PORT_STACKS
        request = Request(port, "/stacks", STACKS_TIMEOUT, STACKS_LIMIT)
        try:
            answer = await self._fetch(namespace, pod.name, pod.ip, request)
            return pod.name, answer.decode(errors="replace")
        except (ApiError, aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            return pod.name, f"no stacks from port {port}: {error or type(error).__name__}"

    async def _progress(self, namespace: str, pod: str, ip: str | None) -> bytes:
        request = Request(PORT_PROGRESS, "/progress", PROGRESS_TIMEOUT, PROGRESS_LIMIT)
        return await self._fetch(namespace, pod, ip, request)

    async def _fetch(self, namespace: str, pod: str, ip: str | None, request: Request) -> bytes:
        if ip is None or self._proxied(ip):
            return await self.client.proxy_pod(
                namespace, pod, request.port, request.path, timeout=request.timeout, limit=request.limit
            )
        host = f"[{ip}]" if ":" in ip else ip
        timeout = aiohttp.ClientTimeout(total=request.timeout)
        url = f"http://{host}:{request.port}{request.path}"
        # A user's image decides what is answered: it may not send the operator anywhere else.
        async with self.http.get(url, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                raise aiohttp.ClientResponseError(
                    response.request_info, response.history, status=response.status
                )
            return await read_all(response.content, request.limit)

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
