"""Answers /progress as rank 0 of a training does, on an address of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from yuan2_core.contract import PORT_PROGRESS, Progress


class ProgressServer:
    """Serves whatever `progress` is; nothing while it is None."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.progress: Progress | None = None
        self.stacks = ""
        self.asked = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[ProgressServer]:
        """Listen inside this context."""
        server = ThreadingHTTPServer((self.address, PORT_PROGRESS), self._handler())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked += 1
                progress = owner.progress.to_json() if owner.progress is not None else ""
                body = (owner.stacks if self.path == "/stacks" else progress).encode()
                self._answer(body)

            def _answer(self, body: bytes) -> None:
                self.send_response(200 if body else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
                """Tests have enough output."""

        return Handler
