"""FastChat's controller as the API server uses it: where the workers of a model are, remembered while it is
away."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from typing import Any

import aiohttp

from yuan2_server.openai_errors import OpenAIError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
ASKS = 16
"""Times the controller is asked for a worker that was not avoided. Under shortest_queue each answer lengthens
that worker's queue in the controller's book, so that another one's turn comes."""
AVOIDED_SECONDS = 10.0
"""How long a worker that could not be reached is left for others.

The controller is not told: its /refresh_all_workers would ask every worker in turn and answer nobody
meanwhile, 5 s for each that is silent.
"""
REMEMBERED_SECONDS = 60.0
"""How long a worker is tried that the controller named before it went away or lost its memory."""


class Controller:
    """The workers of each model, as the controller last said."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._clock = clock
        self._models: list[str] = []
        self._named: dict[str, dict[str, float]] = {}
        """Model to worker's address to when the controller named it."""
        self._avoided: dict[str, float] = {}
        """Address to the time until which others are tried first."""

    async def models(self) -> list[str]:
        """Names that the controller knows a worker for, sorted; while it does not answer, the last ones, or
        those whose workers are remembered.

        Raises OpenAIError (503) when there are none.
        """
        try:
            self._models = sorted((await self._ask("/list_models", {}))["models"])
        except OpenAIError:
            known = self._models or sorted(model for model in self._named if self._remembered(model))
            if not known:
                raise
            return known
        return self._models

    async def worker(self, model: str, tried: Collection[str] = ()) -> str:
        """Address of a worker, if there is one not of those `tried`; empty when there is none at all.

        While the controller does not answer, or knows nobody since it was started again, a worker is given
        that it named before. Raises OpenAIError (503) when there is none of those either.
        """
        last = ""
        try:
            for _ in range(ASKS):
                last = str((await self._ask("/get_worker_address", {"model": model}))["address"])
                if not last:
                    break
                self._named.setdefault(model, {})[last] = self._clock()
                if self._is_good(last, tried):
                    return last
                if any(self._is_good(address, tried) for address in self._remembered(model)):
                    break
        except OpenAIError:
            if not self._remembered(model):
                raise
        remembered = self._remembered(model)
        good = [address for address in remembered if self._is_good(address, tried)]
        return random.choice(good or [last or random.choice(remembered or [""])])

    def avoid(self, address: str) -> None:
        """Prefer other workers for a while: this one could not be reached."""
        self._avoided[address] = self._clock() + AVOIDED_SECONDS

    def _is_good(self, address: str, tried: Collection[str]) -> bool:
        return address not in tried and self._avoided.get(address, 0.0) <= self._clock()

    def _remembered(self, model: str) -> list[str]:
        oldest = self._clock() - REMEMBERED_SECONDS
        named = {address: at for address, at in self._named.get(model, {}).items() if at >= oldest}
        self._named[model] = named
        return list(named)

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        """The controller's answer; asked once more when the connection breaks, for these questions change
        nothing."""
        try:
            try:
                return await self._post(path, body)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                return await self._post(path, body)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            log.warning("controller %s%s: %r", self._url, path, error)
            message = "The controller does not answer; try again later."
            raise OpenAIError(503, message, code="no_controller") from error

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        async with self._session.post(self._url + path, json=body, timeout=timeout) as response:
            response.raise_for_status()
            return await response.json()
