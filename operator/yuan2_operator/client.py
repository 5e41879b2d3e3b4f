"""A thin asynchronous client of the Kubernetes API: paths and dicts, no typed models.

The typed classes of the official client cost more memory than the whole operator, and a dozen requests do not
need them. Answers that are not success become the exceptions below, in one place.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from yuan2_operator.constants import FIELD_MANAGER, GROUP, PLURAL_FINETUNE, PLURAL_SERVICE, VERSION
from yuan2_operator.metrics import API_REQUESTS

Object = dict[str, Any]

CREDENTIALS_SECONDS = 60.0
"""How long credentials are used before they are read again: bound service account tokens rotate."""
REQUEST_SECONDS = 30.0
LIST_CHUNK = 500
CONNECTIONS = 32
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
JSON = "application/json"
UNKNOWN_FIELD = "field not declared in schema"
"""What server-side apply says of an unknown field, with status 500, though trying again is of no use."""


class ApiError(Exception):
    """The API server said no, or nothing."""

    def __init__(self, message: str, *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class NotFound(ApiError):  # noqa: N818 - named as the API names it
    """404."""


class Conflict(ApiError):  # noqa: N818
    """409: it exists already, another manager owns a field, or a precondition does not hold."""


class Forbidden(ApiError):  # noqa: N818
    """401 or 403: credentials, RBAC, a quota or an admission policy."""


class Invalid(ApiError):  # noqa: N818
    """400 or 422: the object itself is refused."""


class Unavailable(ApiError):  # noqa: N818
    """429, 5xx or no answer: try again."""


class TooLong(ApiError):  # noqa: N818
    """An answer has more bytes than the caller takes."""


class Credentials(Protocol):
    """What is needed of a login; kopf.ConnectionInfo has it."""

    @property
    def server(self) -> str: ...

    def as_http_headers(self) -> dict[str, str]: ...

    def as_ssl_context(self) -> ssl.SSLContext: ...


@dataclass(frozen=True)
class Resource:
    """A kind of objects, by its place in the API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """`/apis/batch/v1/namespaces/demo/jobs/x/status`; without `namespace`, across all of them."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{namespace}" if namespace else ""
        parts = [root + scope, self.plural, *(part for part in (name, subresource) if part)]
        return "/".join(parts)


FINETUNES = Resource(GROUP, VERSION, PLURAL_FINETUNE)
YUAN_SERVICES = Resource(GROUP, VERSION, PLURAL_SERVICE)
JOBS = Resource("batch", "v1", "jobs")
DEPLOYMENTS = Resource("apps", "v1", "deployments")
PODS = Resource("", "v1", "pods")
SERVICES = Resource("", "v1", "services")
CONFIG_MAPS = Resource("", "v1", "configmaps")
SECRETS = Resource("", "v1", "secrets")
CLAIMS = Resource("", "v1", "persistentvolumeclaims")
NODES = Resource("", "v1", "nodes")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
EVENTS = Resource("events.k8s.io", "v1", "events")

WORKLOADS = Resource("kueue.x-k8s.io", "v1beta2", "workloads")
POD_GROUPS = {
    "scheduling.volcano.sh/v1beta1": Resource("scheduling.volcano.sh", "v1beta1", "podgroups"),
    "scheduling.x-k8s.io/v1alpha1": Resource("scheduling.x-k8s.io", "v1alpha1", "podgroups"),
}
"""By apiVersion: two schedulers have a kind of this name."""
DISRUPTION_BUDGETS = Resource("policy", "v1", "poddisruptionbudgets")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")

CHILD_RESOURCES = {
    "Job": JOBS,
    "Deployment": DEPLOYMENTS,
    "Service": SERVICES,
    "ConfigMap": CONFIG_MAPS,
    "PodDisruptionBudget": DISRUPTION_BUDGETS,
    "NetworkPolicy": NETWORK_POLICIES,
}
"""Kinds of objects that the operator makes."""


def child_resource(manifest: Mapping[str, Any]) -> Resource:
    """The resource of an object that the operator makes."""
    return POD_GROUPS.get(manifest["apiVersion"]) or CHILD_RESOURCES[manifest["kind"]]


@dataclass(frozen=True)
class Call:
    """One request to the API server."""

    method: str
    verb: str
    """What is done, as the metrics name it."""
    resource: Resource
    path: str
    params: Mapping[str, str] | None = None
    body: Object | None = None
    content_type: str = JSON
    timeout: float = REQUEST_SECONDS
    """Seconds for the whole answer."""
    limit: int | None = None
    """Bytes of an answer that are taken; more raise `TooLong`."""


class Client:
    """One session with the API server. `login` gives fresh credentials each time it is called."""

    def __init__(self, login: Callable[[], Credentials]) -> None:
        self._login = login
        self._credentials = login()
        self._read_at = time.monotonic()
        connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=self._tls())
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        )

    async def close(self) -> None:
        """End the session."""
        await self._session.close()

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object; `NotFound` if there is none."""
        return await self._object(Call("GET", "get", resource, resource.path(namespace, name)))

    async def list_all(
        self, resource: Resource, namespace: str | None, selector: str = "", fields: str = ""
    ) -> list[Object]:
        """All objects that `selector` (labels) and `fields` (field selector) take, in one namespace or in
        all."""
        items: list[Object] = []
        selectors = {"labelSelector": selector, "fieldSelector": fields}
        params = {"limit": str(LIST_CHUNK), **{key: value for key, value in selectors.items() if value}}
        while True:
            page = await self._object(Call("GET", "list", resource, resource.path(namespace), params))
            items.extend(page.get("items", ()))
            token = page.get("metadata", {}).get("continue")
            if not token:
                return items
            params = {**params, "continue": token}

    async def any_of(self, resource: Resource, namespace: str | None, selector: str) -> bool:
        """Whether there is an object that `selector` (labels) takes."""
        params = {"limit": "1", **({"labelSelector": selector} if selector else {})}
        page = await self._object(Call("GET", "list", resource, resource.path(namespace), params))
        return bool(page.get("items"))

    async def apply(self, manifest: Object, *, force: bool) -> Object:
        """Server-side apply; without `force`, `Conflict` when somebody else set one of the fields
        differently."""
        resource, metadata = child_resource(manifest), manifest["metadata"]
        path = resource.path(metadata["namespace"], metadata["name"])
        params = {"fieldManager": FIELD_MANAGER, "force": str(force).lower()}
        return await self._object(
            Call("PATCH", "apply", resource, path, params, manifest, content_type=APPLY_PATCH)
        )

    async def create(self, resource: Resource, namespace: str, manifest: Object) -> Object:
        """Create one object; `Conflict` if its name is taken."""
        path = resource.path(namespace)
        # A field that does not exist, from a user's podTemplate, is an error; the default is to drop it.
        params = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return await self._object(Call("POST", "create", resource, path, params, manifest))

    async def replace(self, resource: Resource, body: Object) -> Object:
        """Replace one object by `body`; `Conflict` if it is not the version that `body` was made of."""
        path = resource.path(body["metadata"]["namespace"], body["metadata"]["name"])
        params = {"fieldManager": FIELD_MANAGER}
        return await self._object(Call("PUT", "update", resource, path, params, body))

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, propagation: str = "Background"
    ) -> None:
        """Delete one object and what it owns (`Background` or `Foreground`); fine if it is gone."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        try:
            await self._object(Call("DELETE", "delete", resource, resource.path(namespace, name), body=body))
        except NotFound:
            return

    async def patch_status(
        self, resource: Resource, namespace: str, name: str, patch: Object, version: str = ""
    ) -> Object:
        """Merge `patch` into the status of one object; gives the whole object as it then is.

        `Conflict` if the object is not at `version` any more: what was decided on may have changed.
        """
        path, params = resource.path(namespace, name, "status"), {"fieldManager": FIELD_MANAGER}
        body: Object = {"status": patch}
        if version:
            body["metadata"] = {"resourceVersion": version}
        return await self._object(
            Call("PATCH", "patch_status", resource, path, params, body, content_type=MERGE_PATCH)
        )

    async def proxy_pod(
        self, namespace: str, pod: str, port: int, path: str, *, timeout: float, limit: int
    ) -> bytes:
        """GET from a pod through the API server: at most `limit` bytes of an answer that is not trusted."""
        target = PODS.path(namespace, f"{pod}:{port}", "proxy") + path
        return await self._send(Call("GET", "proxy", PODS, target, timeout=timeout, limit=limit))

    def _tls(self) -> ssl.SSLContext | bool:
        return self._credentials.as_ssl_context() if self._credentials.server.startswith("https") else False

    def _headers(self, content_type: str) -> dict[str, str]:
        if time.monotonic() - self._read_at > CREDENTIALS_SECONDS:
            self._credentials, self._read_at = self._login(), time.monotonic()
        return {"Content-Type": content_type, "Accept": JSON, **self._credentials.as_http_headers()}

    async def _object(self, call: Call) -> Object:
        payload = await self._send(call)
        answer: Object = json.loads(payload) if payload else {}
        return answer

    async def _send(self, call: Call) -> bytes:
        API_REQUESTS.labels(verb=call.verb, resource=call.resource.plural).inc()
        data = None if call.body is None else json.dumps(call.body)
        headers, limit = self._headers(call.content_type), aiohttp.ClientTimeout(total=call.timeout)
        url = self._credentials.server.rstrip("/") + call.path
        try:
            async with self._session.request(
                call.method,
                url,
                params=call.params,
                data=data,
                headers=headers,
                timeout=limit,
                # The API server redirects nobody; a pod behind its proxy might.
                allow_redirects=False,
            ) as response:
                payload = await read_all(response.content, call.limit)
                if response.status >= 300:
                    raise error_of(response.status, payload, response.headers)
                return payload
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise Unavailable(f"{call.method} {call.path}: {error or type(error).__name__}") from error


async def read_all(stream: aiohttp.StreamReader, limit: int | None) -> bytes:
    """The whole body of an answer.

    Raises:
        TooLong: it has more than `limit` bytes.
    """
    payload = bytearray()
    async for chunk in stream.iter_any():
        payload += chunk
        if limit is not None and len(payload) > limit:
            raise TooLong(f"an answer of more than {limit} bytes")
    return bytes(payload)


def error_of(status: int, payload: bytes, headers: Mapping[str, str]) -> ApiError:
    """The exception for an answer with an error `status`; its text is that of the answer's Status object."""
    try:
        message = str(json.loads(payload)["message"])
    except (ValueError, KeyError, TypeError):
        message = payload[:500].decode(errors="replace").strip() or f"HTTP status {status}"
    seconds = headers.get("Retry-After", "")
    retry_after = float(seconds) if seconds.isdigit() else None
    kind: type[ApiError] = Unavailable
    if UNKNOWN_FIELD in message:
        return Invalid(message, status=status)
    if status < 500 and status != 429:
        kind = {404: NotFound, 409: Conflict, 401: Forbidden, 403: Forbidden}.get(status, Invalid)
    return kind(message, status=status, retry_after=retry_after)
