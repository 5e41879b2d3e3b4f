"""Plays the scheduler and the kubelet on a control plane without a node: pods run and end as a test says.

Everything goes through the API server, as a kubelet reports do; the controllers that react are the real ones.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from yuan2_local.client import ApiError, Client

HEARTBEAT_SECONDS = 5.0


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class FakeNode:
    """One node, kept Ready, and what its kubelet would report about pods."""

    client: Client
    name: str = "node-a"
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def up(self) -> Iterator[FakeNode]:
        """The node exists and is alive inside this context."""
        self.client.create(
            "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name}}
        )
        self._beat()
        heart = threading.Thread(target=self._live, daemon=True)
        heart.start()
        try:
            yield self
        finally:
            self._stop.set()
            heart.join(timeout=10)
            self.client.delete(f"/api/v1/nodes/{self.name}")

    def pods(self, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """Pods by name."""
        query = f"?labelSelector={selector}" if selector else ""
        items = self.client.get(f"/api/v1/namespaces/{namespace}/pods{query}")["items"]
        return sorted(items, key=lambda pod: pod["metadata"]["name"])

    def bind(self, pod: dict[str, Any]) -> None:
        """Put a pod on the node, as the scheduler does."""
        metadata = pod["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.name},
        }
        self.client.request("POST", _path(pod, "binding"), body)

    def run(self, pod: dict[str, Any], ip: str = "127.0.0.1") -> None:
        """Its container runs and is ready."""
        if "nodeName" not in pod["spec"]:
            self.bind(pod)
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": _now()}
            for kind in ("PodScheduled", "ContainersReady", "Ready")
        ]
        state = {"running": {"startedAt": _now()}}
        self._report(pod, "Running", state, conditions, podIP=ip, podIPs=[{"ip": ip}])

    def end(
        self, pod: dict[str, Any], code: int, message: Any = "", *, reason: str = "", **status: Any
    ) -> None:
        """Its container has ended; a message that is no text is written as JSON, as our trainer does."""
        text = message if isinstance(message, str) else json.dumps(message)
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "message": text,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        # First the container has ended, then, when volumes and network are gone, the pod has.
        self._report(pod, "Running", {"terminated": ended}, [])
        phase = "Succeeded" if code == 0 else "Failed"
        self._report(pod, phase, {"terminated": ended}, status.pop("conditions", []), **status)

    def confirm_deletion(self, pod: dict[str, Any], code: int | None = None, message: Any = "") -> None:
        """A pod that is being deleted has ended: report that, and let the object go."""
        if code is not None:
            self.end(pod, code, message)
        with contextlib.suppress(ApiError):
            self.client.request("DELETE", _path(pod), {"gracePeriodSeconds": 0})

    def _report(
        self,
        pod: dict[str, Any],
        phase: str,
        state: dict[str, Any],
        conditions: list[dict[str, Any]],
        **more: Any,
    ) -> None:
        container = pod["spec"]["containers"][0]
        status = {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": container["image"],
                    "ready": "running" in state,
                    "restartCount": 0,
                    "state": state,
                }
            ],
            **more,
        }
        self.client.merge(_path(pod, "status"), {"status": status})

    def _live(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, ApiError):
                self._beat()

    def _beat(self) -> None:
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": _now()}
        body = {"status": {"conditions": [ready]}, "metadata": {"annotations": {"beat": _now()}}}
        self.client.merge(f"/api/v1/nodes/{self.name}/status", body)


def _path(pod: dict[str, Any], subresource: str = "") -> str:
    metadata = pod["metadata"]
    tail = f"/{subresource}" if subresource else ""
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}{tail}"
