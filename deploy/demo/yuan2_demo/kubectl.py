"""The two ways to a cluster: `kubectl` for what changes it, and one long-lived `kubectl proxy` for reading.

kubectl is asked rather than a client library because it understands every kubeconfig; the proxy listens on a
socket in a private directory, so polling costs no process a second and opens nothing to other users.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from yuan2_local.proxies import around_proxy

from .errors import DemoError

_START_SECONDS = 20.0


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Reader:
    """GETs from the API server through a `kubectl proxy`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, path: str, seconds: float = 10.0) -> Any:
        """The JSON at an API path, or None when it is absent or the API server cannot be reached just now."""
        connection = _SocketConnection(self._path, seconds)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            return json.loads(body) if response.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()


class Kubectl:
    """Runs kubectl against one cluster."""

    def __init__(self, program: str, kubeconfig: Path) -> None:
        self.program = program
        self.kubeconfig = kubeconfig

    def __call__(self, *args: str) -> str:
        """Run to the end and return stdout. Raises DemoError with what kubectl said."""
        done = subprocess.run(
            [self.program, *args], env=self._environ(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise DemoError(f"kubectl {' '.join(args[:4])}: {said}")
        return done.stdout

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """A `Reader` that lives as long as the block."""
        with tempfile.TemporaryDirectory(prefix="yuan2-demo-") as folder:
            path = Path(folder) / "api.sock"
            with self._background("proxy", f"--unix-socket={path}"):
                deadline = time.monotonic() + _START_SECONDS
                while not path.exists():
                    if time.monotonic() > deadline:
                        raise DemoError("kubectl proxy does not start", look=f"{self.program} proxy")
                    time.sleep(0.05)
                yield Reader(path)

    @contextlib.contextmanager
    def port_forward(self, namespace: str, service: str, port: int) -> Iterator[str]:
        """`http://127.0.0.1:N` that leads to a port of a Service as long as the block."""
        args = ("port-forward", "--namespace", namespace, f"service/{service}", f":{port}")
        with self._background(*args) as output:
            found = re.search(r"127\.0\.0\.1:(\d+)", _first_line(output))
            if not found:
                raise DemoError(f"cannot reach service {service}", look=f"kubectl {' '.join(args)}")
            yield f"http://127.0.0.1:{found[1]}"

    @contextlib.contextmanager
    def _background(self, *args: str) -> Iterator[IO[str]]:
        # A session of its own: Ctrl-C is for the demo, which then ends its helpers itself.
        process = subprocess.Popen(
            [self.program, *args],
            env=self._environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()

    def _environ(self) -> dict[str, str]:
        return {**os.environ, **around_proxy(os.environ), "KUBECONFIG": str(self.kubeconfig)}


def _first_line(output: IO[str]) -> str:
    ready, _, _ = select.select([output], [], [], _START_SECONDS)
    return output.readline() if ready else ""
