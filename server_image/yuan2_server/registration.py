"""Keeps a worker known to FastChat's controller, whose memory does not outlive its process."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

log = logging.getLogger(__name__)

INTERVAL_VARIABLE = "FASTCHAT_WORKER_HEART_BEAT_INTERVAL"
DEFAULT_INTERVAL = 5.0
"""Seconds. FastChat's own default is 45: a restarted controller would not know its workers for that long."""
RETRY_SECONDS = 1.0
"""Between two attempts to reach a controller that does not answer."""
TIMEOUT_SECONDS = 5.0


def heart_beat_interval(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds between two heartbeats, from FastChat's variable. Raises ValueError when that is not a number >
    0."""
    value = environment.get(INTERVAL_VARIABLE, "")
    if not value:
        return DEFAULT_INTERVAL
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{INTERVAL_VARIABLE}: {value!r} is not a number of seconds greater than 0")
    return seconds


class Registration:
    """Registers one worker, sends its heartbeats, and registers again when the controller has forgotten
    it."""

    def __init__(
        self, controller_url: str, address: str, status: Callable[[], dict[str, Any]], interval: float
    ) -> None:
        self._controller_url = controller_url.rstrip("/")
        self._address = address
        self._status = status
        self._interval = interval
        self._names: list[str] = []
        """The models that the controller was told of last."""
        self.registered = False
        """Whether the controller answered the last call and knows this worker."""

    async def run(self) -> None:
        """Register and keep registered, until cancelled."""
        async with _session() as session:
            while True:
                try:
                    await self._beat(session)
                    delay = self._interval
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError) as error:
                    self._lost(error)
                    delay = min(RETRY_SECONDS, self._interval)
                await asyncio.sleep(delay)

    async def withdraw(self) -> None:
        """Tell the controller that this worker serves no model any more; best effort. There is no
        deregistration."""
        try:
            async with _session() as session:
                await self._register(session)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            log.warning("could not withdraw from the controller: %s", error)
        self.registered = False

    async def _beat(self, session: aiohttp.ClientSession) -> None:
        status = self._status()
        if self.registered and status["model_names"] == self._names:
            body = {"worker_name": self._address, "queue_length": status["queue_length"]}
            async with session.post(self._controller_url + "/receive_heart_beat", json=body) as response:
                response.raise_for_status()
                if (await response.json())["exist"]:
                    return
            log.info("the controller does not know this worker any more")
        await self._register(session)
        self.registered = True
        log.info(
            "registered %s with %s for %s", self._address, self._controller_url, self._names or "no model"
        )

    async def _register(self, session: aiohttp.ClientSession) -> None:
        status = self._status()
        self._names = status["model_names"]
        body = {
            "worker_name": self._address,
            "check_heart_beat": True,
            "worker_status": status,
            "multimodal": False,
        }
        async with session.post(self._controller_url + "/register_worker", json=body) as response:
            response.raise_for_status()

    def _lost(self, error: Exception) -> None:
        if self.registered:
            log.warning("the controller at %s does not answer: %r", self._controller_url, error)
        self.registered = False


def _session() -> aiohttp.ClientSession:
    """A session that uses each connection once: FastChat's controller closes idle ones after 5 s, which is
    how long they are idle between two heartbeats."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        connector=aiohttp.TCPConnector(force_close=True),
    )
