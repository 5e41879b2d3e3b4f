"""What is known about a request everywhere: its id, and whose key it came with."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_GIVEN = re.compile(r"[A-Za-z0-9._:-]{1,128}")

request_id: ContextVar[str] = ContextVar("request_id", default="-")
key_name: ContextVar[str] = ContextVar("key_name", default="")
"""Name of the API key, empty where none is asked for."""


class Identified:
    """ASGI middleware: a request has the id that its client gave it, or a new one; its answer has it too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex
        request_id.set(name)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        await self._app(scope, receive, tell)


def forwarded() -> dict[str, str]:
    """Headers by which the next program knows the same request."""
    name = request_id.get()
    return {} if name == "-" else {HEADER: name}


class WithRequestId(logging.Filter):
    """Adds `request` to a log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always keep it."""
        record.request = request_id.get()
        return True
