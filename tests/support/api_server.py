"""An API server that answers what a test has prepared."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from yuan2_operator.client import Client


@dataclass
class Login:
    """Credentials for a server without TLS."""

    server: str
    tokens: list[str] = field(default_factory=lambda: ["first"])

    def as_http_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[-1]}"}

    def as_ssl_context(self) -> ssl.SSLContext:
        raise AssertionError("plain HTTP needs none")


class Api:
    """Answers with what a test has put into `answers`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.redirections: dict[str, str] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any, str]] = []

    def answer(self, method: str, path: str, body: Any, status: int = 200) -> None:
        self.answers.setdefault((method, path), []).append((status, body))

    def redirect(self, path: str, location: str) -> None:
        """Send whoever GETs `path` to another place."""
        self.redirections[path] = location

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else None
        self.asked.append((request.method, request.path, dict(request.query), body, request.content_type))
        if request.path in self.redirections:
            raise web.HTTPFound(self.redirections[request.path])
        prepared = self.answers.get((request.method, request.path), [])
        status, reply = prepared.pop(0) if prepared else (404, {"message": "not found"})
        return web.json_response(reply, status=status)


@pytest.fixture
async def api() -> AsyncIterator[tuple[Api, Client]]:
    made = Api()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = Client(lambda: Login(f"http://127.0.0.1:{runner.addresses[0][1]}"))
    yield made, client
    await client.close()
    await runner.cleanup()
