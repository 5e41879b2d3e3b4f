"""What the children of both kinds have in common: owner, labels, security, claims, resources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pydantic import BaseModel

from yuan2_core.contract import JOB_FILE
from yuan2_operator.api.pods import Affinity, LocalObjectReference, ResourceRequirements, Toleration
from yuan2_operator.constants import (
    ANNOTATION_APPLIED_HASH,
    CLAIMS_DIRECTORY,
    FIELD_MANAGER,
    GPU_RESOURCE,
    LABEL_INSTANCE,
    LABEL_MANAGED_BY,
    LABEL_NAME,
    LABEL_PART_OF,
    PART_OF,
    RUN_AS_GROUP,
    RUN_AS_USER,
    SCRATCH_DIRECTORY,
)
from yuan2_operator.plan.owner import Owner, digest, selector_labels

Manifest = dict[str, Any]

JOB_VOLUME = "job"
SCRATCH_VOLUME = "scratch"


def child_labels(owner: Owner, component: str) -> dict[str, str]:
    """`selector_labels` and the labels that Kubernetes recommends."""
    return {
        LABEL_NAME: f"{PART_OF}-{component}",
        LABEL_INSTANCE: owner.name,
        LABEL_PART_OF: PART_OF,
        LABEL_MANAGED_BY: FIELD_MANAGER,
        **selector_labels(owner, component),
    }


def owner_reference(owner: Owner) -> Manifest:
    """The reference by which the garbage collector removes a child with its owner."""
    return {
        "apiVersion": owner.api_version,
        "kind": owner.kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def metadata(
    owner: Owner,
    name: str,
    component: str,
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """Metadata of a child: its name, its owner, its labels."""
    result: Manifest = {
        "name": name,
        "namespace": owner.namespace,
        "labels": {**child_labels(owner, component), **(labels or {})},
        "ownerReferences": [owner_reference(owner)],
    }
    if annotations:
        result["annotations"] = dict(annotations)
    return result


def stamped(manifest: Manifest) -> Manifest:
    """The manifest with a hash of itself.

    Comparing a child field by field finds what it lacks, never what it has too much, such as a node selector
    that the user took back; with the hash, that is a difference as well.
    """
    stamp = {ANNOTATION_APPLIED_HASH: digest(json.dumps(manifest, sort_keys=True))}
    own = manifest["metadata"]
    return {**manifest, "metadata": {**own, "annotations": {**own.get("annotations", {}), **stamp}}}


def config_map(
    owner: Owner, name: str, component: str, job: str, labels: Mapping[str, str] | None = None
) -> Manifest:
    """The ConfigMap with a pod's one file, `job.json`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(owner, name, component, labels=labels),
        "data": {JOB_FILE.name: job},
    }


def passthrough(value: BaseModel) -> Manifest:
    """A part of core/v1 that a user wrote, as Kubernetes wants it: only what was given."""
    return value.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


class Placed(Protocol):
    """The fields by which a user says where pods may run."""

    @property
    def node_selector(self) -> dict[str, str]: ...
    @property
    def tolerations(self) -> list[Toleration]: ...
    @property
    def affinity(self) -> Affinity | None: ...
    @property
    def priority_class_name(self) -> str | None: ...


def placement(wanted: Placed) -> Manifest:
    """The fields of a pod spec that say where it may run: only those the user gave."""
    fields: Manifest = {}
    if wanted.node_selector:
        fields["nodeSelector"] = dict(wanted.node_selector)
    if wanted.tolerations:
        fields["tolerations"] = [passthrough(toleration) for toleration in wanted.tolerations]
    if wanted.affinity is not None:
        fields["affinity"] = passthrough(wanted.affinity)
    if wanted.priority_class_name is not None:
        fields["priorityClassName"] = wanted.priority_class_name
    return fields


def pod_security_context() -> Manifest:
    """Non-root, and claims are made writable for the group, which is done once and not at each mount."""
    return {
        "runAsNonRoot": True,
        "runAsUser": RUN_AS_USER,
        "runAsGroup": RUN_AS_GROUP,
        "fsGroup": RUN_AS_GROUP,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security_context() -> Manifest:
    """No privilege, no capability, a read-only root."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def resources(
    requirements: ResourceRequirements, gpus: int = 0, gpu_resource: str = GPU_RESOURCE
) -> Manifest:
    """Resources of a container; GPUs stand in the limits, where extended resources belong."""
    result = passthrough(requirements)
    if gpus:
        result["limits"] = {**result.get("limits", {}), gpu_resource: str(gpus)}
    return result


def pull_secrets(references: Iterable[LocalObjectReference]) -> list[Manifest]:
    """imagePullSecrets of a pod."""
    return [{"name": reference.name} for reference in references]


def image_fields(image: str, policy: str | None) -> Manifest:
    """Image and, where the user said so, its pull policy; else Kubernetes decides by the tag."""
    return {"image": image} if policy is None else {"image": image, "imagePullPolicy": policy}


def claim_volumes(claims: Iterable[str]) -> list[Manifest]:
    """Volumes of distinct claims. They are numbered, since a claim's name may be longer than a volume's."""
    return [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}}
        for index, claim in enumerate(sorted(set(claims)))
    ]


def claim_mounts(claims: Iterable[str], writable: Iterable[str] = ()) -> list[Manifest]:
    """Mounts of distinct claims at `/mnt/claims/<claimName>`, read-only unless `writable`."""
    allowed = set(writable)
    return [
        {
            "name": f"claim-{index}",
            "mountPath": str(CLAIMS_DIRECTORY / claim),
            **({} if claim in allowed else {"readOnly": True}),
        }
        for index, claim in enumerate(sorted(set(claims)))
    ]


def job_volume(config: str) -> Manifest:
    """The volume of the ConfigMap `config`."""
    return {"name": JOB_VOLUME, "configMap": {"name": config}}


def job_mount() -> Manifest:
    """The mount of `job.json` alone: nothing could be mounted below the directory of a read-only volume."""
    return {
        "name": JOB_VOLUME,
        "mountPath": str(JOB_FILE),
        "subPath": JOB_FILE.name,
        "readOnly": True,
    }


def scratch_volume(limit: str | None = None) -> Manifest:
    """The volume of /tmp; past its size limit the kubelet evicts the pod."""
    return {"name": SCRATCH_VOLUME, "emptyDir": {} if limit is None else {"sizeLimit": limit}}


def scratch_mount() -> Manifest:
    """The mount of /tmp."""
    return {"name": SCRATCH_VOLUME, "mountPath": str(SCRATCH_DIRECTORY)}
