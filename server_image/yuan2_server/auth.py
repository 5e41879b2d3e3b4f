"""API keys from a mounted Secret: a file a key, read again when the Secret rotates."""

from __future__ import annotations

import hmac
import time
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from yuan2_server.openai_errors import OpenAIError
from yuan2_server.requests import key_name

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes for the kubelet and Prometheus, which have no key."""
REREAD_SECONDS = 1.0


class KeyDirectory:
    """The keys in a directory: each file's name is the key's, its content without white space around it the
    key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._keys: dict[str, bytes] = {}
        self._read = float("-inf")

    def keys(self) -> dict[str, bytes]:
        """The keys by name, of now or of at most `REREAD_SECONDS` ago."""
        if time.monotonic() - self._read > REREAD_SECONDS:
            self._keys = self._read_keys()
            self._read = time.monotonic()
        return self._keys

    def name_of(self, key: str) -> str | None:
        """The name of this key, None when there is none. Takes as long for a key that is nearly right as for
        any other."""
        given = key.encode(errors="surrogatepass")
        found = [name for name, known in self.keys().items() if hmac.compare_digest(given, known)]
        return found[0] if found else None

    def _read_keys(self) -> dict[str, bytes]:
        # The kubelet puts the data into a directory named ..DATE and links to it: hidden names are not keys.
        try:
            files = [file for file in sorted(self._directory.iterdir()) if not file.name.startswith(".")]
            contents = {file.name: file.read_bytes().strip() for file in files if file.is_file()}
        except OSError:
            return {}
        return {name: content for name, content in contents.items() if content}


class RequireKey:
    """ASGI middleware: every path but `OPEN_PATHS` wants `Authorization: Bearer KEY`, whether it exists or
    not."""

    def __init__(self, app: ASGIApp, keys: KeyDirectory) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            problem = self._problem(HTTPConnection(scope).headers.get("authorization", ""))
            if problem:
                error = OpenAIError(401, problem, code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, header: str) -> str:
        scheme, _, key = header.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return "You didn't provide an API key: send the header `Authorization: Bearer KEY`."
        name = self._keys.name_of(key.strip())
        if name is None:
            return "Incorrect API key provided."
        key_name.set(name)
        return ""
