"""An HTTP server that a program starts and stops itself, and the signals that ask it to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

T = TypeVar("T")

GRACE_SECONDS = 86_400
"""Answers under way get this long to end once the server stops; the pod's grace period may end sooner."""

KEEP_ALIVE_SECONDS = 75
"""Idle connections are kept longer than clients and proxies pool them (60 s at most by default): who closes
first must be the one who sends, or a request goes out on a connection that is just being closed."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: what SIGTERM means is decided by the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def install_signal_handlers(self) -> None:
        """The older name of the same hook."""


class HttpServer:
    """Serves an ASGI application on every address of this host."""

    def __init__(self, app: ASGIApp, port: int, host: str = "0.0.0.0") -> None:
        self.port = port
        self.config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._server = _Server(self.config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the port cannot be had."""
        self._task = asyncio.create_task(self._serve())
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise OSError("the HTTP server ended while starting")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Let open requests end, at most `GRACE_SECONDS`, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    async def _serve(self) -> None:
        try:
            await self._server.serve()
        except SystemExit as exit_:
            # uvicorn has logged why it could not listen; an exception tells the program, which owns the exit
            # code.
            raise OSError("the HTTP server could not listen") from exit_


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Must be called in the running loop of the main thread."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """The result of blocking work that must not keep the program from ending, as a thread pool's would."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 -- raised again where it is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(future)
