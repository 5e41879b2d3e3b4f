"""The part of core/v1 that users pass through to pods: same names, same meaning, validated by the CRD."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from yuan2_operator.api.schema import DnsName, Quantity, Spec, Text, list_map, rules
from yuan2_operator.constants import GPU_RESOURCE

ImagePullPolicy = Literal["Always", "IfNotPresent", "Never"]
ImageReference = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")]
LabelKey = Annotated[str, Field(min_length=1, max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
Weight = Annotated[int, Field(ge=1, le=100)]
ResourceList = Annotated[dict[str, Quantity], Field(max_length=32)]


class LocalObjectReference(Spec):
    """An object of the same namespace."""

    name: DnsName
    """Name of the object."""


class ResourceRequirements(Spec):
    """What a container asks of its node, without GPUs: those have a field of their own."""

    requests: ResourceList = Field(default_factory=dict)
    """What is set aside for the container."""
    limits: ResourceList = Field(default_factory=dict)
    """What the container may not exceed."""


class Toleration(Spec):
    """A taint that the pod may run beside."""

    key: LabelKey | None = None
    """Key of the taint; absent with operator Exists, every key."""
    operator: Literal["Exists", "Equal"] | None = None
    """How `value` is compared; Equal when absent."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; absent, every effect."""
    toleration_seconds: int | None = None
    """Seconds a NoExecute taint is borne; absent, for ever."""


class NodeSelectorRequirement(Spec):
    """One comparison with a label or field of a node."""

    key: LabelKey
    """Label or field."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How `values` are compared."""
    values: Annotated[list[LabelValue], Field(max_length=256)] = Field(default_factory=list)
    """What the label is compared with."""


Requirements = Annotated[list[NodeSelectorRequirement], Field(max_length=64)]


class NodeSelectorTerm(Spec):
    """Comparisons that must all hold."""

    match_expressions: Requirements = Field(default_factory=list)
    """Comparisons with labels."""
    match_fields: Requirements = Field(default_factory=list)
    """Comparisons with fields, such as metadata.name."""


class NodeSelector(Spec):
    """Terms of which one must hold."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(min_length=1, max_length=64)]
    """The alternatives."""


class PreferredSchedulingTerm(Spec):
    """A wish about nodes."""

    weight: Weight
    """Weight among all wishes, 1 to 100."""
    preference: NodeSelectorTerm
    """What the node should be."""


class NodeAffinity(Spec):
    """Which nodes the pod must or should be on."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes it must be on."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        list[PreferredSchedulingTerm], Field(max_length=64)
    ] = Field(default_factory=list)
    """Nodes it should be on."""


class LabelSelectorRequirement(Spec):
    """One comparison with a label of a pod or namespace."""

    key: LabelKey
    """The label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How `values` are compared."""
    values: Annotated[list[LabelValue], Field(max_length=256)] = Field(default_factory=list)
    """What the label is compared with."""


class LabelSelector(Spec):
    """Objects by their labels; everything in it must hold."""

    match_labels: dict[str, LabelValue] = Field(default_factory=dict)
    """Labels and their values."""
    match_expressions: Annotated[list[LabelSelectorRequirement], Field(max_length=64)] = Field(
        default_factory=list
    )
    """Comparisons with labels."""


class PodAffinityTerm(Spec):
    """Pods that this pod wants near, or far."""

    topology_key: LabelKey
    """Node label that says what near means, such as kubernetes.io/hostname."""
    label_selector: LabelSelector | None = None
    """The pods."""
    namespaces: Annotated[list[DnsName], Field(max_length=64)] = Field(default_factory=list)
    """Their namespaces; empty, this pod's own."""
    namespace_selector: LabelSelector | None = None
    """Their namespaces by label, beside `namespaces`."""


class WeightedPodAffinityTerm(Spec):
    """A wish about other pods."""

    weight: Weight
    """Weight among all wishes, 1 to 100."""
    pod_affinity_term: PodAffinityTerm
    """The pods."""


class PodAffinity(Spec):
    """Pods that must or should be near (or, as anti-affinity, far)."""

    required_during_scheduling_ignored_during_execution: Annotated[
        list[PodAffinityTerm], Field(max_length=64)
    ] = Field(default_factory=list)
    """What must hold."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        list[WeightedPodAffinityTerm], Field(max_length=64)
    ] = Field(default_factory=list)
    """What should hold."""


class Affinity(Spec):
    """Where the scheduler puts the pod."""

    node_affinity: NodeAffinity | None = None
    """By labels of nodes."""
    pod_affinity: PodAffinity | None = None
    """Near other pods."""
    pod_anti_affinity: PodAffinity | None = None
    """Away from other pods."""


class KeySelector(Spec):
    """A key of a Secret or ConfigMap."""

    name: DnsName
    """Name of the object."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Key in it."""
    optional: bool | None = None
    """The pod starts even if the object or the key is missing."""


class FieldSelector(Spec):
    """A field of the pod itself."""

    field_path: Annotated[str, Field(min_length=1, max_length=512)]
    """Such as status.podIP or spec.nodeName."""


class EnvVarSource(Spec):
    """Where the value of a variable comes from: exactly one member."""

    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""
    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""
    field_ref: FieldSelector | None = None
    """A field of the pod."""


ONE_ENV_SOURCE = rules(
    (
        "[has(self.secretKeyRef), has(self.configMapKeyRef), has(self.fieldRef)].exists_one(given, given)",
        "valueFrom: name exactly one of secretKeyRef, configMapKeyRef and fieldRef",
    )
)
ONE_ENV_VALUE = rules(
    (
        "!(has(self.value) && has(self.valueFrom))",
        "an environment variable has either value or valueFrom: remove one",
    )
)
NO_GPU_RESOURCE = rules(
    (
        f"!(has(self.requests) && '{GPU_RESOURCE}' in self.requests)"
        f" && !(has(self.limits) && '{GPU_RESOURCE}' in self.limits)",
        f"resources: ask for GPUs with gpusPerWorker instead of {GPU_RESOURCE}",
    )
)


class EnvVar(Spec):
    """An environment variable of a container."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")]
    """Name of the variable."""
    value: Text | None = None
    """Its value."""
    value_from: Annotated[EnvVarSource, Field(json_schema_extra=ONE_ENV_SOURCE)] | None = None
    """Where its value comes from."""


ResourceName = Annotated[
    str,
    Field(
        min_length=3,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$",
    ),
]
"""An extended resource, such as nvidia.com/gpu."""


class PodMetadata(Spec):
    """Labels and annotations of pods."""

    labels: Annotated[dict[str, LabelValue], Field(max_length=64)] = Field(default_factory=dict)
    """Labels beside the operator's own."""
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=65536)]], Field(max_length=64)] = Field(
        default_factory=dict
    )
    """Annotations beside the operator's own."""


class PodTemplate(Spec):
    """A part of a pod, laid over the one that the operator makes."""

    metadata: PodMetadata = Field(default_factory=PodMetadata)
    """Labels and annotations to add."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """Any fields of a core/v1 PodSpec, merged as `kubectl patch` does: containers, variables and volumes by
    name, mounts by path; tolerations are added; other lists are replaced."""


def gpu_rules(field: str) -> tuple[tuple[str, str], ...]:
    """The rules of a section with `gpusPerWorker`, `gpuResource` and `resources`."""
    given = [
        f"(has(self.resources.{part}) && self.gpuResource in self.resources.{part})"
        for part in ("requests", "limits")
    ]
    return (
        (
            f"!has(self.resources) || !({' || '.join(given)})",
            f"{field}.resources: {field}.gpusPerWorker asks for what gpuResource names; remove it here",
        ),
        (
            "!self.gpuResource.contains('/mig-') || !has(self.gpusPerWorker) || self.gpusPerWorker <= 1",
            f"{field}: a process uses one MIG slice, and those of one pod cannot work together; "
            "set gpusPerWorker to 1",
        ),
    )


Resources = Annotated[ResourceRequirements, Field(json_schema_extra=NO_GPU_RESOURCE)]
Tolerations = Annotated[list[Toleration], Field(max_length=64)]
NodeLabels = Annotated[dict[str, LabelValue], Field(max_length=64)]
PullSecrets = Annotated[list[LocalObjectReference], Field(max_length=16, json_schema_extra=list_map("name"))]
Environment = Annotated[
    list[Annotated[EnvVar, Field(json_schema_extra=ONE_ENV_VALUE)]],
    Field(max_length=256, json_schema_extra=list_map("name")),
]
