"""What a user may lay over a pod: what the operator decides, and what would break the namespace's isolation,
is rejected with the path of the field. Pure.

The isolation is the restricted Pod Security Standard
(https://kubernetes.io/docs/concepts/security/pod-security-standards/), whatever the namespace enforces: the
pod is made with the operator's rights to make pods, not with the user's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from yuan2_core.contract import JOB_FILE, KEYS_DIRECTORY
from yuan2_operator.api.pods import PodTemplate
from yuan2_operator.constants import (
    CLAIMS_DIRECTORY,
    COMPONENT_API,
    COMPONENT_WEB,
    COMPONENT_WORKER,
    DATASET_DIRECTORY,
    EVALUATION_DIRECTORY,
    PART_OF,
    SCRATCH_DIRECTORY,
    SHARED_MEMORY_DIRECTORY,
    TRAINER_CONTAINER,
    TRAINER_RESERVED_ENV,
    Reason,
)
from yuan2_operator.plan.references import Rejection

PRIVILEGES = (
    "capabilities",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "hostPath",
    "hostPort",
    "privileged",
    "procMount",
    "root",
    "seLinux",
    "serviceAccountToken",
    "sysctls",
    "unconfined",
    "volumeTypes",
)
"""What the administrator's settings may allow, by name."""

_POD_FIELDS = {
    "activeDeadlineSeconds": "runPolicy.activeDeadlineSeconds of a Yuan2FineTune limits the whole run",
    "ephemeralContainers": "kubectl debug adds them",
    "hostname": "the Job names its pods",
    "nodeName": "it passes the scheduler by; name the node in nodeSelector as kubernetes.io/hostname",
    "restartPolicy": "the operator restarts all ranks together",
    "schedulingGates": "a gate that nobody removes keeps pods from starting",
    "subdomain": "the pods find each other by it",
    "terminationGracePeriodSeconds": "use terminationGracePeriodSeconds beside podTemplate",
}
"""Fields of a pod that the operator decides, and why."""
_CONTAINER_FIELDS = {
    "args": "the operator decides what runs",
    "command": "the operator decides what runs",
    "image": "use the field image",
    "livenessProbe": "the operator watches the process",
    "readinessProbe": "the operator watches the process",
    "restartPolicy": "the operator restarts all ranks together",
    "startupProbe": "the operator watches the process",
    "terminationMessagePath": "the operator reads the message",
    "terminationMessagePolicy": "the operator reads the message",
}
"""Fields of the container that the operator makes."""
_OWN_VOLUMES = frozenset({"job", "shm", "scratch", "dataset", "evaluation", "keys", "cache"})
_OWN_LABELS = (
    "app.kubernetes.io/",
    "batch.kubernetes.io/",
    "kueue.x-k8s.io/pod-group-",
    "kueue.x-k8s.io/queue-name",
    "training.kubeflow.org/",
    "yuan2.dev/",
)
_OWN_LABEL_NAMES = frozenset({"controller-uid", "job-name"})
_SAFE_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "name",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    }
)
_SELINUX_TYPES = frozenset({"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
_MAY_BE_NULL = frozenset(
    f"securityContext.{name}" for name in ("fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsUser")
)
"""Values that a cluster decides by itself (OpenShift's user ranges) or storage does without (NFS)."""
_CONTAINERS = ("initContainers", "containers")
MERGE_KEYS = {
    "claims": "name",
    "containers": "name",
    "env": "name",
    "hostAliases": "ip",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "resourceClaims": "name",
    "topologySpreadConstraints": "topologyKey",
    "volumeDevices": "devicePath",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
"""Lists that are maps by this key: `patchMergeKey` of core/v1."""
_LISTS = frozenset({"add", "drop", "sources", "sysctls", "tolerations"})
_OBJECTS = frozenset(
    {
        "appArmorProfile",
        "capabilities",
        "nodeSelector",
        "projected",
        "resources",
        "seLinuxOptions",
        "seccompProfile",
        "securityContext",
        "windowsOptions",
    }
)


@dataclass(frozen=True)
class Owned:
    """What of a component's pod belongs to the operator."""

    container: str
    env: Collection[str]
    mounts: Collection[str]


@dataclass(frozen=True)
class Fault:
    """A field that is not taken."""

    path: str
    text: str
    privilege: str | None = None
    """The permission that would let it pass."""


OF_TRAINER = Owned(
    TRAINER_CONTAINER,
    TRAINER_RESERVED_ENV,
    tuple(
        map(
            str,
            (JOB_FILE, CLAIMS_DIRECTORY, DATASET_DIRECTORY, EVALUATION_DIRECTORY, SHARED_MEMORY_DIRECTORY),
        )
    ),
)


def of_component(component: str) -> Owned:
    """What of a service's pod belongs to the operator."""
    env = [
        "HOME",
        "POD_IP",
        "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION",
        "FASTCHAT_WORKER_HEART_BEAT_INTERVAL",
    ]
    mounts = [JOB_FILE, CLAIMS_DIRECTORY, SCRATCH_DIRECTORY]
    if component == COMPONENT_WORKER:
        mounts.append(SHARED_MEMORY_DIRECTORY)
    if component in (COMPONENT_API, COMPONENT_WEB):
        mounts.append(KEYS_DIRECTORY)
    return Owned(f"{PART_OF}-{component}", tuple(env), tuple(map(str, mounts)))


def reject_template(
    template: PodTemplate | None, field: str, owned: Owned, namespace: str, allowed: Collection[str]
) -> Rejection | None:
    """The refusal of the first field of a template that is not taken; None when all are.

    Args:
        template: what the user wrote at `field`.
        field: the path of the template, such as `spec.workers.podTemplate`.
        owned: what of the pod is the operator's.
        namespace: of the resource.
        allowed: names of `PRIVILEGES` that the administrator allows: everywhere, or as `NAMESPACE/NAME`.
    """
    if template is None:
        return None
    for fault in _faults(template, owned):
        if fault.privilege is not None and {fault.privilege, f"{namespace}/{fault.privilege}"} & set(allowed):
            continue
        text = f"{field}.{fault.path}: {fault.text}"
        if fault.privilege is not None:
            text += f"; an administrator may allow it: YUAN2_POD_PRIVILEGES={namespace}/{fault.privilege}"
        return Rejection(Reason.INVALID_SPEC, text)
    return None


def _faults(template: PodTemplate, owned: Owned) -> Iterator[Fault]:
    for part, keys in (("labels", template.metadata.labels), ("annotations", template.metadata.annotations)):
        for key in keys:
            if key.startswith(_OWN_LABELS) or key in _OWN_LABEL_NAMES:
                yield Fault(f"metadata.{part}[{key}]", "it is set by the operator; remove it")
    spec = template.spec
    faults = [*_nulls(spec, ""), *_misshapen(spec, "spec")]
    yield from faults
    if faults:
        return
    for name, why in _POD_FIELDS.items():
        if name in spec:
            yield Fault(f"spec.{name}", f"it is set by the operator: {why}")
    yield from _of_pod(spec)
    yield from _of_volumes(spec.get("volumes", ()))
    for kind in _CONTAINERS:
        for container in spec.get(kind, ()):
            path = f"spec.{kind}[{container['name']}]"
            yield from _of_container(container, path)
            if container["name"] == owned.container:
                yield from _of_main(container, path, owned)


def node_selector(labels: Mapping[str, str], template: PodTemplate | None) -> dict[str, str]:
    """Labels that the nodes of a pod must have: those of the field beside the template, and its own."""
    given = template.spec.get("nodeSelector") if template is not None else None
    return {**labels, **(given if isinstance(given, Mapping) else {})}


def _nulls(value: Any, path: str) -> Iterator[Fault]:
    """A null takes away what the operator wrote; that is for few fields."""
    if value is None and path.lstrip(".") not in _MAY_BE_NULL:
        yield Fault(f"spec{path}", "null is not taken here; leave the field out")
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _nulls(part, f"{path}.{key}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from _nulls(part, f"{path}[{index}]")


def _misshapen(value: Any, path: str, name: str = "") -> Iterator[Fault]:
    """What could not be merged or judged; of everything else the API server knows the shape."""
    if name in _OBJECTS and not isinstance(value, Mapping):
        yield Fault(path, "write an object")
    if name in _LISTS and not isinstance(value, list):
        yield Fault(path, "write a list")
    key = MERGE_KEYS.get(name)
    if key is not None and not _keyed(value, key):
        yield Fault(path, f"write a list of objects, each with {key}")
    elif isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _misshapen(inner, f"{path}.{part}", part)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _misshapen(inner, f"{path}[{index}]")


def _keyed(value: Any, key: str) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) and key in entry for entry in value)


def _of_pod(spec: Mapping[str, Any]) -> Iterator[Fault]:
    for name in ("hostIPC", "hostNetwork", "hostPID"):
        if spec.get(name):
            yield Fault(f"spec.{name}", "it shares a namespace of the node", name)
    if spec.get("automountServiceAccountToken"):
        text = "training and serving need no credentials of the cluster"
        yield Fault("spec.automountServiceAccountToken", text, "serviceAccountToken")
    context = spec.get("securityContext", {})
    yield from _of_security(context, "spec.securityContext")
    for entry in context.get("sysctls", ()):
        if entry.get("name") not in _SAFE_SYSCTLS:
            yield Fault(
                "spec.securityContext.sysctls", f"{entry.get('name')} is not a safe sysctl", "sysctls"
            )


def _of_security(context: Mapping[str, Any], path: str) -> Iterator[Fault]:
    """Of the securityContext of a pod or a container."""
    if context.get("runAsUser") == 0:
        yield Fault(f"{path}.runAsUser", "the pod would run as root", "root")
    if context.get("runAsNonRoot") is False:
        yield Fault(f"{path}.runAsNonRoot", "the pod could run as root", "root")
    for name in ("seccompProfile", "appArmorProfile"):
        if (context.get(name) or {}).get("type") == "Unconfined":
            yield Fault(f"{path}.{name}", "the process would be unconfined", "unconfined")
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("user") or selinux.get("role") or selinux.get("type", "") not in _SELINUX_TYPES:
        yield Fault(f"{path}.seLinuxOptions", "a user, a role or a type that is not a container's", "seLinux")
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield Fault(f"{path}.windowsOptions.hostProcess", "it is a process of the node", "privileged")


def _of_container(container: Mapping[str, Any], path: str) -> Iterator[Fault]:
    context = container.get("securityContext", {})
    yield from _of_security(context, f"{path}.securityContext")
    for name in ("privileged", "allowPrivilegeEscalation"):
        if context.get(name):
            yield Fault(
                f"{path}.securityContext.{name}", "it takes the container's isolation away", "privileged"
            )
    capabilities = context.get("capabilities") or {}
    if capabilities.get("add") or "ALL" not in capabilities.get("drop", ("ALL",)):
        yield Fault(
            f"{path}.securityContext.capabilities",
            "all capabilities are dropped, none is added",
            "capabilities",
        )
    if context.get("procMount", "Default") != "Default":
        yield Fault(f"{path}.securityContext.procMount", "/proc would be unmasked", "procMount")
    for port in container.get("ports", ()):
        if port.get("hostPort"):
            yield Fault(
                f"{path}.ports[{port['containerPort']}].hostPort", "it takes a port of the node", "hostPort"
            )


def _of_main(container: Mapping[str, Any], path: str, owned: Owned) -> Iterator[Fault]:
    """Of the container that the operator makes."""
    for name, why in _CONTAINER_FIELDS.items():
        if name in container:
            yield Fault(f"{path}.{name}", f"it is set by the operator: {why}")
    for name in container.get("resources", {}):
        if name != "claims":
            yield Fault(
                f"{path}.resources.{name}",
                "it is set by the operator: use the field resources beside podTemplate",
            )
    for entry in container.get("env", ()):
        if entry["name"] in owned.env:
            yield Fault(f"{path}.env[{entry['name']}]", "it is set by the operator; remove it")
    for entry in container.get("volumeMounts", ()):
        mount = str(entry["mountPath"]).rstrip("/") or "/"
        if any(
            f"{place}/".startswith(f"{mount.rstrip('/')}/") or f"{mount}/".startswith(f"{place}/")
            for place in owned.mounts
        ):
            yield Fault(
                f"{path}.volumeMounts[{entry['mountPath']}]", "the operator mounts there; choose another path"
            )


def _of_volumes(volumes: Collection[Mapping[str, Any]]) -> Iterator[Fault]:
    for volume in volumes:
        name, path = str(volume["name"]), f"spec.volumes[{volume['name']}]"
        if name in _OWN_VOLUMES or (name.startswith("claim-") and name[6:].isdigit()):
            yield Fault(path, "the operator has a volume of this name; choose another")
        if "hostPath" in volume:
            yield Fault(f"{path}.hostPath", "it shows the pod a directory of the node", "hostPath")
        for kind in sorted({*volume} - _SAFE_VOLUMES - {"hostPath"}):
            yield Fault(f"{path}.{kind}", "reach this storage through a PersistentVolumeClaim", "volumeTypes")
        projected = volume.get("projected") or {}
        if any("serviceAccountToken" in source for source in projected.get("sources", ())):
            text = "training and serving need no credentials of the cluster"
            yield Fault(f"{path}.projected", text, "serviceAccountToken")
