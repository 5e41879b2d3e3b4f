"""The pods of a service: what all components have in common, and what differs as arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from yuan2_operator.api.pods import ResourceRequirements
from yuan2_operator.api.service import ServiceSpec
from yuan2_operator.constants import GPU_RESOURCE, PART_OF, SCRATCH_DIRECTORY
from yuan2_operator.manifests.common import (
    Manifest,
    container_security_context,
    image_fields,
    pod_security_context,
    pull_secrets,
    scratch_mount,
    scratch_volume,
)
from yuan2_operator.manifests.common import (
    resources as resource_fields,
)

PORT_NAME = "http"
START_PERIOD_SECONDS = 1
READY_PERIOD_SECONDS = 2
LIVE_PERIOD_SECONDS = 5
PROBE_TIMEOUT_SECONDS = 5
READY_FAILURES = 3
LIVE_FAILURES = 12
"""A minute without an answer: a busy process answers late, a dead one never."""
START_SECONDS = 300


def probes(ready: str, live: str, *, start_seconds: int = START_SECONDS) -> Manifest:
    """Start-up, readiness and liveness by HTTP; liveness counts only once the start-up probe has passed."""
    return {
        "startupProbe": _probe(live, START_PERIOD_SECONDS, start_seconds // START_PERIOD_SECONDS),
        "readinessProbe": _probe(ready, READY_PERIOD_SECONDS, READY_FAILURES),
        "livenessProbe": _probe(live, LIVE_PERIOD_SECONDS, LIVE_FAILURES),
    }


def _probe(path: str, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": PORT_NAME},
        "timeoutSeconds": PROBE_TIMEOUT_SECONDS,
        "periodSeconds": period,
        "failureThreshold": failures,
    }


def container(
    component: str,
    spec: ServiceSpec,
    image: str,
    *,
    command: Sequence[str],
    port: int,
    resources: ResourceRequirements,
    probes: Manifest,
    gpus: int = 0,
    gpu_resource: str = GPU_RESOURCE,
    env: Mapping[str, str] | None = None,
    pod_ip: bool = False,
    mounts: Sequence[Manifest] = (),
) -> Manifest:
    """The one container of a component's pod."""
    variables: list[Manifest] = [{"name": "HOME", "value": str(SCRATCH_DIRECTORY)}]
    variables += [{"name": name, "value": value} for name, value in (env or {}).items()]
    if pod_ip:
        variables.append({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    return {
        "name": f"{PART_OF}-{component}",
        **image_fields(image, spec.image_pull_policy),
        "command": list(command),
        "env": variables,
        "ports": [{"name": PORT_NAME, "containerPort": port, "protocol": "TCP"}],
        "resources": resource_fields(resources, gpus, gpu_resource),
        **probes,
        "securityContext": container_security_context(),
        # A crash that leaves no message shows the end of its log instead.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [scratch_mount(), *mounts],
    }


def pod_spec(
    spec: ServiceSpec, container: Manifest, *, volumes: Sequence[Manifest] = (), grace_seconds: int = 30
) -> Manifest:
    """A pod without Kubernetes credentials and without a writable root."""
    result: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security_context(),
        "terminationGracePeriodSeconds": grace_seconds,
        "containers": [container],
        "volumes": [scratch_volume(), *volumes],
    }
    if spec.image_pull_secrets:
        result["imagePullSecrets"] = pull_secrets(spec.image_pull_secrets)
    return result
