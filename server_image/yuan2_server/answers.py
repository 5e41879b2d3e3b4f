"""HTTP answers that end when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

STALLED_SECONDS = 60.0
CLIENT_GONE = 499
"""nginx's status for a client that left; nobody reads it."""


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, cancelling it when the client leaves. Raises ClientGoneError then.

    The request's body must have been read before.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await _cancel(task)
        await _cancel(gone)


class Stream(Response):
    """Sends what an async generator yields, until its end or until the client leaves.

    `close` is called either way, also when the generator was never started.
    """

    def __init__(
        self, body: AsyncGenerator[bytes, None], media_type: str, close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._chunks = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 -- ASGI has it
        """Answer one request (ASGI)."""
        pump: asyncio.Task[None] = asyncio.create_task(
            self._pump(lambda message: self._send(send, message, pump))
        )
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done() and not pump.cancelled():
                pump.result()
        except OSError:  # the connection broke while sending
            pass
        finally:
            await _cancel(pump)
            await _cancel(gone)
            await self._chunks.aclose()
            await self._close()

    async def _send(self, send: Send, message: Message, pump: asyncio.Task[None]) -> None:
        """Send; a client that takes nothing for `STALLED_SECONDS` is taken for one that has left."""
        timer = asyncio.get_running_loop().call_later(STALLED_SECONDS, pump.cancel)
        try:
            await send(message)
        finally:
            timer.cancel()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[T]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
