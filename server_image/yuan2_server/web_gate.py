"""FastChat's web page behind the service's API keys.

The page itself listens on loopback only; who asks for it shows a key, as the password that browsers ask for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from yuan2_server.answers import CLIENT_GONE, ClientGoneError, Stream
from yuan2_server.auth import KeyDirectory
from yuan2_server.bodies import BodyTooLargeError, SlowUploadError, read_body
from yuan2_server.lifecycle import HttpServer, stop_requested

log = logging.getLogger(__name__)

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}
)
"""Headers that are about one connection (RFC 9110, 7.6.1), and the length, which is told anew."""
END_SECONDS = 5.0


def page_command(port: int, controller_url: str) -> list[str]:
    """FastChat's page, unmodified, on loopback."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--controller-url", controller_url]
    return [sys.executable, "-m", "fastchat.serve.gradio_web_server", *options, "--model-list-mode", "reload"]


class Gate:
    """Passes requests on to the page at `url`, if they come with a key."""

    def __init__(self, keys: KeyDirectory, url: str) -> None:
        self._keys = keys
        self._url = url
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[Route("/healthz", self._healthz), Route("/{path:path}", self._pass_on, methods=METHODS)]
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _healthz(self, _: Request) -> Response:
        try:
            async with self._session.get(self._url, allow_redirects=False) as answer:
                return PlainTextResponse("ok", 200 if answer.status < 500 else 503)
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return PlainTextResponse("the page does not answer", 503)

    async def _pass_on(self, request: Request) -> Response:
        if self._keys.name_of(password(request.headers.get("authorization", ""))) is None:
            ask = {"www-authenticate": 'Basic realm="API key as password", charset="UTF-8"'}
            return PlainTextResponse("Log in with any name and an API key as the password.", 401, headers=ask)
        try:
            body = await read_body(request)
        except (BodyTooLargeError, SlowUploadError):
            return PlainTextResponse("The request is too large or too slow.", 413)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name not in HOP_BY_HOP and name != "authorization"
        ]
        target = self._url + request.url.path + (f"?{request.url.query}" if request.url.query else "")
        try:
            answer = await self._session.request(
                request.method, target, headers=headers, data=body, allow_redirects=False
            )
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return PlainTextResponse("The page does not answer; try again later.", 502)
        return _answered(answer)


def password(header: str) -> str:
    """The password of HTTP's Basic scheme; empty when there is none."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode().partition(":")[2].strip()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _answered(answer: aiohttp.ClientResponse) -> Response:
    async def body() -> AsyncGenerator[bytes, None]:
        async for data in answer.content.iter_any():
            yield data

    async def close() -> None:
        answer.close()

    response = Stream(body(), answer.content_type, close)
    response.status_code = answer.status
    headers = [(name.lower(), value) for name, value in answer.headers.items()]
    response.raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers if name not in HOP_BY_HOP
    ]
    return response


async def run_web(port: int, page_port: int, controller_url: str, keys: Path) -> int:
    """Serve until SIGTERM or until the page ends; gives the exit code."""
    stop = stop_requested()
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    page = await asyncio.create_subprocess_exec(*page_command(page_port, controller_url), env=environment)
    gate = Gate(KeyDirectory(keys), f"http://127.0.0.1:{page_port}")
    server = HttpServer(gate.app(), port)
    try:
        await server.start()
        ended, asked = asyncio.create_task(page.wait()), asyncio.create_task(stop.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        return 0 if not ended.done() else ended.result() or 1
    finally:
        if page.returncode is None:
            page.terminate()
            try:
                await asyncio.wait_for(page.wait(), END_SECONDS)
            except asyncio.TimeoutError:
                page.kill()
        await gate.close()
        # What the page was streaming has ended with it.
        await server.stop()
