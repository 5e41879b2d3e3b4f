"""A small HTTP server: /healthz and /readyz for the kubelet, /metrics for Prometheus."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

logger = logging.getLogger(__name__)

Check = Callable[[], bool]


async def serve(port: int, *, healthy: Check, ready: Check) -> web.AppRunner:
    """Listen on `port` of every address; the caller ends it with `cleanup()`."""
    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", _probe(healthy)),
            web.get("/readyz", _probe(ready)),
            web.get("/metrics", _metrics),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    # A free port (0) is another one for IPv4 and IPv6.
    places = ", ".join(f"{address[0]}:{address[1]}" for address in runner.addresses)
    logger.info("health and metrics on %s", places)
    return runner


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        holds = check()
        return web.Response(text="ok\n" if holds else "not ok\n", status=200 if holds else 503)

    return answer


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
