"""The API program: answer until SIGTERM, then let open requests end."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from yuan2_core.contract import ServeJob
from yuan2_server.auth import KeyDirectory
from yuan2_server.lifecycle import HttpServer, stop_requested
from yuan2_server.openai_api import ApiServer
from yuan2_server.upstream import Upstream

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""After SIGTERM new requests still arrive until every kube-proxy has heard that this pod ends."""


async def run_api(job: ServeJob, keys: Path) -> None:
    """Serve until SIGTERM."""
    stop = stop_requested()
    upstream = Upstream(job.api.controller_url, job.names)
    api = ApiServer(job, upstream, KeyDirectory(keys))
    server = HttpServer(api.app(), job.api.port)
    try:
        await server.start()
        log.info("serving %s on port %d", job.served_name, job.api.port)
        await stop.wait()
        api.stopping = True
        await asyncio.sleep(SETTLE_SECONDS)
        await server.stop()
    finally:
        await upstream.close()
