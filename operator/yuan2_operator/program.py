"""`python -m yuan2_operator`: run the operator until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys

import kopf
from pydantic import ValidationError

from yuan2_operator import health
from yuan2_operator.config import Settings
from yuan2_operator.handlers import build_registry, kopf_settings, login
from yuan2_operator.handlers.machine import Machine
from yuan2_operator.logs import JsonFormatter

logger = logging.getLogger("yuan2_operator")


def configure_logging(settings: Settings) -> None:
    """Log to standard error as the settings say; kopf's chatter about single objects stays out."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)


async def run(settings: Settings) -> None:
    """Run until a signal, or until a part of the operator ends by itself, which raises."""
    kopf_config = kopf_settings()
    machine = Machine(settings, lambda: _credentials(kopf_config))
    server = await health.serve(settings.port, healthy=lambda: machine.healthy, ready=lambda: machine.ready)
    # kopf waits for tasks that are younger than itself and then ends them, so the machine's own ones come
    # first.
    work = asyncio.create_task(machine.run(), name="machine")
    await asyncio.sleep(0)
    watch = asyncio.create_task(
        kopf.operator(
            registry=build_registry(machine),
            settings=kopf_config,
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
        ),
        name="kopf",
    )
    try:
        done, _ = await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, watch):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await server.cleanup()
    for task in done:
        task.result()


def _credentials(settings: kopf.OperatorSettings) -> kopf.ConnectionInfo:
    info = login(settings=settings)
    if info is None:
        raise kopf.LoginError("no credentials: run in a pod with a service account, or set KUBECONFIG")
    return info


def main() -> int:
    """The program; gives its exit code."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "YUAN2_" + "_".join(str(part) for part in first["loc"]).upper()
        sys.stderr.write(f"{name}: {first['msg']}\n")
        return 2
    configure_logging(settings)
    asyncio.run(run(settings))
    return 0
