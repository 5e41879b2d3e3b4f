"""A Kubernetes client of a few lines: JSON over HTTPS with a client certificate."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ClusterError

_MERGE = "application/merge-patch+json"
_APPLY = "application/apply-patch+yaml"  # JSON is YAML


class ApiError(ClusterError):
    """The API server refused a request; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Requests to one API server as the user of one certificate in `pki`."""

    def __init__(self, server: str, pki: Path, user: str) -> None:
        self._address = urlsplit(server).netloc
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(str(pki / f"{user}.crt"), str(pki / f"{user}.key"))

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Any:
        """The decoded answer (text when it is not JSON); ApiError for a refusal, OSError when unreachable."""
        connection = self._connect(timeout=30)
        try:
            headers = {"Content-Type": content_type, "Accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise ApiError(answer.status, f"{method} {path}: {answer.status} {_message(text)}")
        return json.loads(text) if text.startswith(("{", "[")) else text

    def get(self, path: str) -> Any:
        """GET."""
        return self.request("GET", path)

    def create(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST; an object that exists already is returned as None."""
        try:
            return self.request("POST", path, body)
        except ApiError as error:
            if error.status == 409:
                return None
            raise

    def merge(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON merge patch."""
        return self.request("PATCH", path, body, _MERGE)

    def apply(self, path: str, body: Mapping[str, Any]) -> Any:
        """Server-side apply of one object at its own path."""
        return self.request("PATCH", f"{path}?fieldManager=yuan2-local&force=true", body, _APPLY)

    def delete(self, path: str) -> None:
        """DELETE; gone already is fine."""
        try:
            self.request("DELETE", path)
        except ApiError as error:
            if error.status != 404:
                raise

    def ok(self, path: str) -> bool:
        """Whether GET succeeds now."""
        try:
            self.get(path)
        except (OSError, ApiError):
            return False
        return True

    def watch(self, path: str, timeout_seconds: int) -> Iterator[dict[str, Any]]:
        """Watch events until the server ends the watch after `timeout_seconds`."""
        separator = "&" if "?" in path else "?"
        connection = self._connect(timeout=timeout_seconds + 30)
        try:
            connection.request("GET", f"{path}{separator}watch=1&timeoutSeconds={timeout_seconds}")
            answer = connection.getresponse()
            if answer.status >= 400:
                raise ApiError(
                    answer.status, f"watch {path}: {answer.status} {_message(answer.read().decode())}"
                )
            while line := answer.readline():
                yield json.loads(line)
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._address, context=self._context, timeout=timeout)


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200]
