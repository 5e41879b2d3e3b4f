"""What an end-to-end test does on the node, by the commands that a user has: apply, get, wait, delete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster import TestCluster
from tests.support.waiting import wait_for
from yuan2_demo import install
from yuan2_local.errors import ClusterError

Object = dict[str, Any]
POLL_SECONDS = 0.5


def install_operator(cluster: TestCluster) -> None:
    """The operator as a Deployment, from deploy/base, with the images of this tree."""
    folder = install.write_overlay("operator", install.operator_overlay(cluster.images))
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(folder))
    operator = f"deployment/{install.OPERATOR}"
    cluster.kubectl("-n", install.OPERATOR_NAMESPACE, "rollout", "status", operator, "--timeout=180s")


@dataclass(frozen=True)
class Namespace:
    """A namespace of one test."""

    cluster: TestCluster
    name: str

    def kubectl(self, *words: str, input: str | None = None) -> str:  # noqa: A002 - subprocess' own name
        return self.cluster.kubectl("-n", self.name, *words, input=input)

    def apply(self, *manifests: Mapping[str, Any]) -> None:
        document = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "-f", "-", input=json.dumps(document))

    def get(self, kind: str, name: str) -> Object:
        return dict(json.loads(self.kubectl("get", kind, name, "-o", "json")))

    def list(self, kind: str, selector: str = "") -> list[Object]:
        words = ["get", kind, "-o", "json", *(["-l", selector] if selector else [])]
        return list(json.loads(self.kubectl(*words))["items"])

    def wait(self, thing: str, condition: str, seconds: float) -> None:
        """`kubectl wait`, and on a time-out what stands in the status instead of it."""
        try:
            self.kubectl("wait", f"--for=condition={condition}", thing, f"--timeout={seconds:g}s")
        except ClusterError as error:
            raise AssertionError(f"{error}\n{self.explain(thing)}") from error

    def until(self, what: str, look: Callable[[], Any], seconds: float) -> Any:
        """The first truthy value of `look`, or what stands in the statuses instead of it."""
        try:
            return wait_for(what, look, seconds, POLL_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain('y2ft,y2svc')}") from error

    def explain(self, things: str) -> str:
        """Conditions and pods, for the message of a test that fails."""
        return "\n".join(
            (self.kubectl("get", things, "-o", "yaml"), self.kubectl("get", "pods", "-o", "wide"))
        )

    def status(self, kind: str, name: str) -> Object:
        return dict(self.get(kind, name).get("status", {}))

    def condition(self, kind: str, name: str, condition: str) -> Object:
        """One condition, {} while it is absent."""
        conditions = self.status(kind, name).get("conditions", [])
        return next((entry for entry in conditions if entry["type"] == condition), {})

    def running_pod(self, finetune: str, index: int) -> str:
        """Name of the pod of one node rank that runs now; "" while there is none."""
        selector = f"yuan2.dev/finetune={finetune},batch.kubernetes.io/job-completion-index={index}"
        pods = [pod for pod in self.list("pods", selector) if pod["status"].get("phase") == "Running"]
        return str(pods[0]["metadata"]["name"]) if pods else ""

    def reach(self, finetune: str, step: int, seconds: float) -> None:
        """Wait until so many optimizer steps of a FineTune are done."""
        self.until(f"step {step} of {finetune}", lambda: self._step(finetune) >= step, seconds)

    def _step(self, finetune: str) -> int:
        """Of rank 0's own word, through the API server's proxy as a user's tool would ask it."""
        pod = self.running_pod(finetune, 0)
        if not pod:
            return 0
        try:
            path = f"/api/v1/namespaces/{self.name}/pods/{pod}:9390/proxy/progress"
            return int(json.loads(self.kubectl("get", "--raw", path))["step"])
        except ClusterError:  # the pod is starting or ending
            return 0

    def evict(self, pod: str) -> None:
        """Evict a pod as a node drain does."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.name},
        }
        path = f"/api/v1/namespaces/{self.name}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))

    def claim(self, name: str, size: str = "2Gi", tmpfs: bool = False) -> Path:
        """A bound claim; returns the directory behind it."""
        directory = self.cluster.volume(f"{self.name}/{name}", size, tmpfs)
        self.apply(claim(name, size))
        return directory


@contextmanager
def namespace(cluster: TestCluster, name: str) -> Iterator[Namespace]:
    """A fresh namespace that goes with the block."""
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=120s")
    cluster.kubectl("create", "namespace", name)
    try:
        yield Namespace(cluster, name)
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


def apply_example(made: Namespace) -> None:
    """Claims, data and base model of examples/identity; returns when the model is there."""
    overlay = install.example_overlay(made.cluster.images) | {"namespace": made.name}
    made.kubectl("apply", "-k", str(install.write_overlay(made.name, overlay)))
    made.wait("job/identity-base", "complete", 300)


def api_url(made: Namespace, service: str) -> str:
    """The OpenAI API of a service, as this machine reaches it."""
    spec = made.get("service", f"{service}-api")["spec"]
    return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"


def example_manifest(name: str) -> Object:
    """A resource of examples/identity, `finetune` or `service`."""
    return dict(yaml.safe_load((install.EXAMPLE / f"{name}.yaml").read_text(encoding="utf-8")))


def claim(name: str, size: str = "2Gi") -> Object:
    """A PersistentVolumeClaim of the default class."""
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def finetune(name: str, **changes: Any) -> Object:
    """A small Yuan2FineTune on CPU: model `models/model`, data `models/data.json`, output
    `models/out/NAME`.

    `changes` replace or extend sections of the spec by their YAML names.
    """
    spec: Object = {
        "model": {"size": "custom", "source": source("model")},
        "dataset": {"source": source("data.json")},
        "method": {"full": {}},
        "training": {
            "maxSteps": 6,
            "maxLength": 128,
            "microBatchSize": 4,
            "gradientAccumulationSteps": 1,
            "learningRate": 1e-3,
            "precision": "fp32",
        },
        "workers": {
            "replicas": 1,
            "processesPerWorker": 1,
            "sharedMemory": "64Mi",
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        },
        "output": source(f"out/{name}"),
    }
    for section, values in changes.items():
        spec[section] = {**spec.get(section, {}), **values}
    return {
        "apiVersion": "yuan2.dev/v1alpha1",
        "kind": "Yuan2FineTune",
        "metadata": {"name": name},
        "spec": spec,
    }


def source(path: str, claim_name: str = "models") -> Object:
    return {"persistentVolumeClaim": {"claimName": claim_name, "path": path}}
