"""A plan of a service as Kubernetes objects: one ConfigMap, and a Deployment and a Service a component."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from yuan2_core.contract import KEYS_DIRECTORY, PORT_CONTROLLER, PORT_WORKER
from yuan2_operator.api.pods import LocalObjectReference
from yuan2_operator.constants import (
    COMPONENT_API,
    COMPONENT_CONTROLLER,
    COMPONENT_WEB,
    COMPONENT_WORKER,
    PART_OF,
    SCRATCH_DIRECTORY,
    SHARED_MEMORY_DIRECTORY,
)
from yuan2_operator.manifests import service_pods as pods
from yuan2_operator.manifests.common import (
    Manifest,
    child_labels,
    claim_mounts,
    claim_volumes,
    config_map,
    job_mount,
    job_volume,
    metadata,
    placement,
    stamped,
)
from yuan2_operator.manifests.pod_template import laid_over
from yuan2_operator.manifests.service_policies import policies, spread
from yuan2_operator.plan.owner import Owner, selector_labels
from yuan2_operator.plan.service import (
    ServicePlan,
    claims,
    component_name,
    components,
    config_name,
    placements,
    revision,
)

KEYS_VOLUME = "keys"
SHARED_MEMORY_VOLUME = "shm"
HEARTBEAT_SECONDS = 5
HEARTBEAT_EXPIRATION_SECONDS = 15
"""FastChat's 45 s and 90 s keep a dead worker in the list for up to 180 s."""
WORKER_START_SECONDS = 1800
"""A large model is read from a network file system for minutes."""
ADDRESS_SECONDS = 3
"""How long after a pod became ready it counts as available, where users connect to it: until then nodes may
not send its Service's address there yet (kube-proxy collects changes for a second) and refuse connections."""
CONTROLLER_GRACE_SECONDS = 3
"""FastChat's controller closes its port on SIGTERM, waits for the answers under way and is then at its end;
its successor waits for that."""
FASTCHAT_PROGRAM = (
    "python",
    "-c",
    "import os, runpy, signal, sys; signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); "
    "del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)",
)
"""Runs a module of FastChat, unmodified, so that SIGTERM ends it at any time.

By itself the first process of a container ignores SIGTERM while it imports; the web page does so for ever,
and the controller never ends (its heart-beat thread is no daemon). It stands here and not in the image,
because `spec.image` may be an older one.
"""

ROLL_WITH_SURGE: Manifest = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
ROLL_IN_PLACE: Manifest = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
"""For pods with GPUs: a cluster whose GPUs are all in use has none for a pod more."""
RECREATE: Manifest = {"type": "Recreate"}
"""For the controller: two of them would each know some of the workers."""


@dataclass(frozen=True)
class ObjectKey:
    """A child by its kind and name, in the namespace of its owner."""

    api_version: str
    kind: str
    name: str


def service_manifests(plan: ServicePlan) -> list[Manifest]:
    """Every child of the service, in the order in which they are applied."""
    job = plan.job.to_json()
    configs = [
        {**config_map(plan.owner, config_name(plan, component), component, job), "immutable": True}
        for component in (COMPONENT_WORKER, COMPONENT_API)
    ]
    parts = [_BUILDERS[component](plan) for component in components(plan.spec)]
    ports = {
        COMPONENT_CONTROLLER: PORT_CONTROLLER,
        COMPONENT_API: plan.spec.api.port,
        COMPONENT_WEB: plan.spec.web.port,
    }
    services = [
        network_service(plan.owner, component, ports[component])
        for component in components(plan.spec)
        if component in ports
    ]
    made = (*configs, *services, *policies(plan), *parts)
    return [manifest if "immutable" in manifest else stamped(manifest) for manifest in made]


def obsolete(plan: ServicePlan, existing: Collection[tuple[str, str]], *, settled: bool) -> list[ObjectKey]:
    """Children to delete, given kind and name of those that exist: those of the web page once it is disabled,
    policies that are not wanted, and, once the rollout has `settled`, job files of earlier revisions."""
    wanted = {(made["kind"], made["metadata"]["name"]) for made in service_manifests(plan)}
    kept = () if settled else ("ConfigMap",)
    return [
        ObjectKey(_VERSIONS[kind], kind, name)
        for kind, name in sorted(existing)
        if (kind, name) not in wanted and kind not in kept
    ]


_VERSIONS = {
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def network_service(owner: Owner, component: str, port: int) -> Manifest:
    """The Service in front of a component's pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, component_name(owner.name, component), component),
        "spec": {
            "type": "ClusterIP",
            "selector": selector_labels(owner, component),
            "ports": [
                {"name": pods.PORT_NAME, "port": port, "targetPort": pods.PORT_NAME, "protocol": "TCP"}
            ],
        },
    }


def controller(plan: ServicePlan) -> Manifest:
    """FastChat's controller, unmodified."""
    options = ["--host", "0.0.0.0", "--port", str(PORT_CONTROLLER)]
    container = pods.container(
        COMPONENT_CONTROLLER,
        plan.spec,
        plan.image,
        command=[
            *FASTCHAT_PROGRAM,
            "fastchat.serve.controller",
            *options,
            "--dispatch-method",
            plan.spec.controller.dispatch,
        ],
        port=PORT_CONTROLLER,
        resources=plan.spec.controller.resources,
        # An empty LOGDIR turns FastChat's log file off; it logs to its output anyway.
        env={"FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": str(HEARTBEAT_EXPIRATION_SECONDS), "LOGDIR": ""},
        probes=pods.probes("/test_connection", "/test_connection"),
    )
    spec = pods.pod_spec(plan.spec, container, grace_seconds=CONTROLLER_GRACE_SECONDS)
    pod = {**spec, **placement(plan.spec.controller)}
    return _deployment(plan, COMPONENT_CONTROLLER, pod, replicas=1, strategy=RECREATE)


def worker(plan: ServicePlan) -> Manifest:
    """The model worker: the only component that mounts the model and may have GPUs."""
    wanted = plan.spec.worker
    volumes = claims(plan.model, plan.spec)
    shared_mounts, shared_volumes = shared_memory(plan)
    container = pods.container(
        COMPONENT_WORKER,
        plan.spec,
        plan.worker_image,
        command=["python", "-m", "yuan2_server", "worker"],
        port=PORT_WORKER,
        resources=wanted.resources,
        gpus=wanted.gpus_per_worker,
        gpu_resource=wanted.gpu_resource,
        env={"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": str(HEARTBEAT_SECONDS)},
        pod_ip=True,
        probes=pods.probes("/readyz", "/healthz", start_seconds=WORKER_START_SECONDS),
        mounts=[job_mount(), *shared_mounts, *claim_mounts(volumes)],
    )
    spec = pods.pod_spec(
        plan.spec,
        container,
        volumes=[
            job_volume(config_name(plan, COMPONENT_WORKER)),
            *shared_volumes,
            *claim_volumes(volumes),
        ],
        grace_seconds=wanted.termination_grace_period_seconds,
    )
    strategy = ROLL_IN_PLACE if wanted.gpus_per_worker else ROLL_WITH_SURGE
    pod = {**spec, **spread(plan.owner, COMPONENT_WORKER), **placement(wanted)}
    deadline = WORKER_START_SECONDS + 300
    return _deployment(
        plan, COMPONENT_WORKER, pod, replicas=wanted.replicas, strategy=strategy, deadline_seconds=deadline
    )


def shared_memory(plan: ServicePlan) -> tuple[list[Manifest], list[Manifest]]:
    """Mount and volume of /dev/shm, through which vLLM's processes and NCCL exchange data: a container has 64
    MiB of its own. None for the built-in engine, which is one process."""
    if plan.job.worker.vllm is None:
        return [], []
    mount = {"name": SHARED_MEMORY_VOLUME, "mountPath": str(SHARED_MEMORY_DIRECTORY)}
    return [mount], [{"name": SHARED_MEMORY_VOLUME, "emptyDir": {"medium": "Memory"}}]


def api(plan: ServicePlan) -> Manifest:
    """The OpenAI-compatible server; with a Secret of keys, each key is a file."""
    wanted = plan.spec.api
    key_mounts, key_volumes = keys(wanted.keys_secret)
    mounts = [job_mount(), *key_mounts]
    volumes = [job_volume(config_name(plan, COMPONENT_API)), *key_volumes]
    container = pods.container(
        COMPONENT_API,
        plan.spec,
        plan.image,
        command=["python", "-m", "yuan2_server", "api"],
        port=wanted.port,
        resources=wanted.resources,
        probes=pods.probes("/readyz", "/healthz"),
        mounts=mounts,
    )
    grace = wanted.termination_grace_period_seconds
    spec = pods.pod_spec(plan.spec, container, volumes=volumes, grace_seconds=grace)
    return _deployment(
        plan,
        COMPONENT_API,
        {**spec, **spread(plan.owner, COMPONENT_API), **placement(wanted)},
        replicas=wanted.replicas,
        strategy=ROLL_WITH_SURGE,
        min_ready_seconds=ADDRESS_SECONDS,
    )


def web(plan: ServicePlan) -> Manifest:
    """FastChat's web page, unmodified; where the API wants keys, behind a gate that wants them, too."""
    wanted, port = plan.spec.web, str(plan.spec.web.port)
    url, secret = plan.job.api.controller_url, plan.spec.api.keys_secret
    if secret is None:
        options = ["--host", "0.0.0.0", "--port", port, "--controller-url", url]
        page = ["fastchat.serve.gradio_web_server", *options, "--model-list-mode", "reload"]
        command = [*FASTCHAT_PROGRAM, *page]
    else:
        options = ["--port", port, "--page-port", str(_page_port(wanted.port)), "--controller-url", url]
        command = ["python", "-m", "yuan2_server", "web", *options]
    alive = "/" if secret is None else "/healthz"
    mounts, volumes = keys(secret)
    container = pods.container(
        COMPONENT_WEB,
        plan.spec,
        plan.image,
        command=command,
        port=wanted.port,
        resources=wanted.resources,
        # The page keeps a log of its conversations; it has no other place to write.
        env={"LOGDIR": str(SCRATCH_DIRECTORY), "GRADIO_ANALYTICS_ENABLED": "False"},
        probes=pods.probes(alive, alive),
        mounts=mounts,
    )
    spec = {**pods.pod_spec(plan.spec, container, volumes=volumes), **placement(wanted)}
    return _deployment(
        plan, COMPONENT_WEB, spec, replicas=1, strategy=RECREATE, min_ready_seconds=ADDRESS_SECONDS
    )


def _page_port(port: int) -> int:
    """Where the page listens behind its gate, on loopback: beside the port that users know."""
    return port + 1 if port < 65535 else port - 1


def keys(secret: LocalObjectReference | None) -> tuple[list[Manifest], list[Manifest]]:
    """Mount and volume of the Secret with the API keys, each of them a file; none without one."""
    if secret is None:
        return [], []
    # The group of the process reads the keys; nobody else does.
    source = {"secretName": secret.name, "defaultMode": 0o440}
    mount = {"name": KEYS_VOLUME, "mountPath": str(KEYS_DIRECTORY), "readOnly": True}
    return [mount], [{"name": KEYS_VOLUME, "secret": source}]


_BUILDERS = {
    COMPONENT_CONTROLLER: controller,
    COMPONENT_WORKER: worker,
    COMPONENT_API: api,
    COMPONENT_WEB: web,
}


def _deployment(
    plan: ServicePlan,
    component: str,
    pod: Manifest,
    *,
    replicas: int,
    strategy: Manifest,
    deadline_seconds: int = 600,
    min_ready_seconds: int = 0,
) -> Manifest:
    owner = plan.owner
    container = f"{PART_OF}-{component}"
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(owner, component_name(owner.name, component), component),
        "spec": {
            "replicas": replicas,
            # The API server leaves a 0 out, and what it left out would look like a difference for ever.
            **({"minReadySeconds": min_ready_seconds} if min_ready_seconds else {}),
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": deadline_seconds,
            "strategy": strategy,
            "selector": {"matchLabels": selector_labels(owner, component)},
            "template": laid_over(
                {
                    "metadata": {
                        "labels": child_labels(owner, component),
                        "annotations": {
                            "kubectl.kubernetes.io/default-container": container,
                            **revision(plan, component),
                        },
                    },
                    "spec": pod,
                },
                placements(plan.spec)[component].pod_template,
            ),
        },
    }
