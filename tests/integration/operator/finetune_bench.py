"""One FineTune on the real control plane, with a node that does what a test says."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.finetunes import finetune_object, progress_of
from tests.support.kubelet import FakeNode
from tests.support.operator_process import Operator
from tests.support.progress_server import ProgressServer
from tests.support.waiting import wait_for
from yuan2_core.contract import Termination

_ADDRESSES = itertools.count(10)
_NAMES = itertools.count(1)


@dataclass
class Bench:
    """Handles of one FineTune of its own namespace."""

    cluster: Any
    operator: Operator
    node: FakeNode
    namespace: str
    name: str = "alpaca"
    trainer: ProgressServer = field(default_factory=lambda: ProgressServer(f"127.0.1.{next(_ADDRESSES)}"))

    @property
    def root(self) -> str:
        return f"/apis/yuan2.dev/v1alpha1/namespaces/{self.namespace}/yuan2finetunes"

    def claims(self, *names: str) -> None:
        for name in names:
            spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
            body = {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name},
                "spec": spec,
            }
            self.cluster.client.create(f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims", body)

    def create(self, **spec: Any) -> None:
        self.cluster.client.create(self.root, finetune_object(self.name, self.namespace, **spec))

    def patch(self, **spec: Any) -> None:
        self.cluster.client.merge(f"{self.root}/{self.name}", {"spec": spec})

    def get(self) -> dict[str, Any]:
        return self.cluster.client.get(f"{self.root}/{self.name}")

    @property
    def status(self) -> dict[str, Any]:
        return self.get().get("status", {})

    def condition(self, kind: str) -> dict[str, Any]:
        return next((entry for entry in self.status.get("conditions", ()) if entry["type"] == kind), {})

    def wait_condition(
        self, kind: str, status: str, reason: str | None = None, seconds: float = 30
    ) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found = self.condition(kind)
            return found if found.get("status") == status and reason in (None, found.get("reason")) else {}

        try:
            return wait_for(f"{kind}={status} {reason or ''}", look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(self.status, indent=1)}") from None

    def jobs(self) -> dict[str, dict[str, Any]]:
        items = self.cluster.client.get(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")["items"]
        return {job["metadata"]["name"]: job for job in items}

    def objects(self, plural: str) -> dict[str, dict[str, Any]]:
        items = self.cluster.client.get(f"/api/v1/namespaces/{self.namespace}/{plural}")["items"]
        return {
            obj["metadata"]["name"]: obj for obj in items if obj["metadata"]["name"] != "kube-root-ca.crt"
        }

    def config(self, attempt: int = 1) -> dict[str, Any]:
        """The one ConfigMap of an attempt."""
        labelled = [
            found
            for found in self.objects("configmaps").values()
            if found["metadata"].get("labels", {}).get("yuan2.dev/attempt") == str(attempt)
        ]
        [config] = labelled
        return config

    def pods(self, attempt: int = 1, count: int = 2) -> list[dict[str, Any]]:
        """Pods of an attempt by rank, as soon as they are all there."""
        selector = f"yuan2.dev/finetune={self.name},yuan2.dev/attempt={attempt}"

        def look() -> list[dict[str, Any]]:
            pods = self.node.pods(self.namespace, selector)
            return pods if len(pods) == count else []

        return wait_for(f"{count} pods of attempt {attempt}", look)

    def run(self, attempt: int = 1, count: int = 2) -> list[dict[str, Any]]:
        """Have the pods of an attempt run and wait until the status says so."""
        pods = self.pods(attempt, count)
        for pod in pods:
            self.node.run(pod, ip=self.trainer.address)
        self.wait_condition("Running", "True")
        return self.pods(attempt, count)

    def says(self, step: int, attempt: int = 1, **more: Any) -> None:
        self.trainer.progress = progress_of(self.name, attempt, step, **more)

    def termination(self, reason: str, message: str, step: int | None = None) -> dict[str, Any]:
        progress = None if step is None else progress_of(self.name, step=step, last_checkpoint_step=step)
        return json.loads(Termination(reason=reason, message=message, progress=progress).to_json())


@contextlib.contextmanager
def bench(
    cluster: Any, operator: Operator, node: FakeNode, claims: tuple[str, ...] = ("models", "data")
) -> Iterator[Bench]:
    """A namespace with claims, a trainer that answers, and everything removed at the end."""
    namespace = f"tune-{next(_NAMES)}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    cluster.client.create("/api/v1/namespaces", body)
    made = Bench(cluster, operator, node, namespace)
    made.claims(*claims)
    with made.trainer.running():
        yield made
    with contextlib.suppress(Exception):
        cluster.client.delete(f"{made.root}/{made.name}")
    for pod in node.pods(namespace):
        node.confirm_deletion(pod)
