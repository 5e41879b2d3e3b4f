"""The running operator: client, cache, queue and the tasks around them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
from prometheus_client import REGISTRY

from yuan2_operator.apply import Applier
from yuan2_operator.cache import Cache
from yuan2_operator.client import (
    YUAN_SERVICES,
    ApiError,
    Client,
    Credentials,
)
from yuan2_operator.config import Settings
from yuan2_operator.constants import FIELD_MANAGER
from yuan2_operator.handlers.fleet import Fleet
from yuan2_operator.handlers.leadership import Leadership
from yuan2_operator.handlers.watched import OWNERS, SELECTORS, WATCHED, audit
from yuan2_operator.metrics import QUEUE_LENGTH
from yuan2_operator.observe import Observer, goes_through_proxy
from yuan2_operator.queue import Key, WorkQueue
from yuan2_operator.reconcile import Reconciler
from yuan2_operator.reconcile.context import Context, utc_now
from yuan2_operator.reconcile.polling import Poller

logger = logging.getLogger(__name__)

RESYNCS_BETWEEN_AUDITS = 6
AGAIN_SECONDS = 1.0
LONGEST_PASS_SECONDS = 180.0
"""A pass that takes longer hangs: every request in it has a time limit."""


class Machine:
    """Begins to work when kopf has called `start` with its indices."""

    def __init__(self, settings: Settings, login: Callable[[], Credentials]) -> None:
        self.settings = settings
        self.queue = WorkQueue(self._process, workers=settings.workers)
        self._login = login
        self._cache: Cache | None = None
        self._reconciler: Reconciler | None = None
        self._client: Client | None = None
        self._http: aiohttp.ClientSession | None = None
        self._poller: Poller | None = None
        self._leadership: Leadership | None = None
        self._started = asyncio.Event()
        self._leads = asyncio.Event()
        self._filled = False
        REGISTRY.register(
            Fleet(
                # What two replicas both told would be counted twice.
                lambda: self._cache if self._leads.is_set() else None,
                lambda: self._poller.words() if self._poller else (),
            )
        )
        QUEUE_LENGTH.set_function(lambda: len(self.queue))

    @property
    def cache(self) -> Cache:
        """What the watches have shown; handlers run only after `start`."""
        if self._cache is None:
            raise RuntimeError("the cache is used before kopf has started")
        return self._cache

    @property
    def client(self) -> Client:
        """The session with the API server."""
        if self._client is None:
            raise RuntimeError("the client is used before kopf has started")
        return self._client

    @property
    def ready(self) -> bool:
        """The caches are filled: kopf hands out no event before all its first lists are indexed."""
        return self._filled

    @property
    def healthy(self) -> bool:
        """No pass hangs."""
        return self.queue.longest_pass() < LONGEST_PASS_SECONDS

    async def start(self, **kwargs: Any) -> None:
        """kopf's startup handler; kopf passes its indices by name."""
        self._client = Client(self._login)
        self._http = aiohttp.ClientSession()
        self._cache = Cache({resource.plural: kwargs[resource.plural] for resource in WATCHED})
        observer = Observer(self._client, self._http, goes_through_proxy(self.settings))
        self._poller = Poller(observer.progress, self.queue.add, self.settings.poll_seconds, utc_now)
        context = Context(
            settings=self.settings,
            client=self._client,
            cache=self._cache,
            applier=Applier(self._client, self._cache),
            observer=observer,
            poller=self._poller,
            instance=f"{FIELD_MANAGER}-{socket.gethostname()}",
        )
        self._reconciler = Reconciler(context)
        if self.settings.lease_namespace:
            identity = f"{socket.gethostname()}-{os.getpid()}"
            namespace = self.settings.lease_namespace
            self._leadership = Leadership(self._client, namespace, identity, utc_now, self._leads)
        self._started.set()
        # What was imported stays: collecting it again and again costs time and unshares memory.
        gc.collect()
        gc.freeze()

    async def run(self) -> None:
        """Work on the queue and come back to everything from time to time, until cancelled; of several
        replicas only the one that leads does."""
        tasks = [
            *self.queue.start(after=self._leads),
            asyncio.create_task(self._resync(), name="resync"),
            asyncio.create_task(self._lead(), name="leadership"),
            asyncio.create_task(self._look_for_anything(), name="first look"),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            if self._client is not None and self._http is not None and self._poller is not None:
                await self._poller.close()
                if self._leadership is not None:
                    await self._leadership.give_back()
                await self._client.close()
                await self._http.close()

    def serves(self, service: Key, finetune: str) -> bool:
        """Whether a Yuan2Service names that FineTune as its model."""
        body = self.cache.itself(YUAN_SERVICES.plural, service)
        model = body["spec"]["model"] if body is not None else {}
        return bool((model.get("fineTuneRef") or {}).get("name") == finetune)

    def saw_an_event(self) -> None:
        """kopf has handed out an event."""
        self._filled = True

    async def _look_for_anything(self) -> None:
        """Without any object there is no event to wait for, and the empty caches are all there is."""
        await self._started.wait()
        while not self._filled:
            try:
                if await self._anything():
                    return
                self._filled = True
            except ApiError as error:  # noqa: PERF203 - it is asked once, and again only after an error
                logger.warning("what there is cannot be listed: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _anything(self) -> bool:
        for resource, labels in SELECTORS.items():
            for namespace in self.settings.watch_namespaces or (None,):
                if await self.client.any_of(resource, namespace, labels):
                    return True
        return False

    async def _lead(self) -> None:
        """Let the workers begin: at once, or when this replica holds the Lease."""
        await self._started.wait()
        if self._leadership is not None:
            await self._leadership.run()
        self._leads.set()
        await asyncio.Event().wait()

    async def _process(self, key: Key) -> float | None:
        if self._reconciler is None:
            raise RuntimeError("a key is worked on before kopf has started")
        return await self._reconciler(key)

    async def _resync(self) -> None:
        """Level-driven to the end: whatever a watch or an event may have missed is found here."""
        count = 0
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            count += 1
            if count % RESYNCS_BETWEEN_AUDITS == 0:
                await self._audit()
            for resource in OWNERS:
                for key in self.cache.keys(resource.plural):
                    self.queue.add(key)

    async def _audit(self) -> None:
        try:
            await audit(self.cache, self.client, self.settings.watch_namespaces)
        except ApiError as error:
            logger.warning("the audit was broken off: %s", error)
