"""Yuan2Service: a model directory becomes an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from yuan2_core.contract import PORT_API, PORT_WEB
from yuan2_core.engine import Share
from yuan2_core.sections import PositiveInt, ServePrecision
from yuan2_operator.api.common import NAME_RULES, ClaimLocation, Condition, ModelReference
from yuan2_operator.api.pods import (
    Affinity,
    ImagePullPolicy,
    ImageReference,
    LabelSelector,
    LocalObjectReference,
    NodeLabels,
    PodTemplate,
    PullSecrets,
    ResourceName,
    ResourceRequirements,
    Resources,
    Tolerations,
    gpu_rules,
)
from yuan2_operator.api.schema import DnsName, Spec, Status, list_map, rules
from yuan2_operator.api.service_engine import (
    ADAPTER_RULE,
    ARGUMENT_RULES,
    ENGINE_RULES,
    EngineArguments,
    EngineChoice,
    Quantization,
)
from yuan2_operator.constants import GPU_RESOURCE

ServicePhase = Literal["Pending", "Progressing", "Ready", "Degraded"]
DispatchMethod = Literal["shortest_queue", "lottery"]
Port = Annotated[int, Field(ge=1024, le=65535)]
"""A TCP port that a process without privileges may open."""

ONE_MODEL = rules(
    (
        "has(self.fineTuneRef) != has(self.source)",
        "model: name exactly one of fineTuneRef (a Yuan2FineTune) and source (a model directory)",
    ),
    (
        "!has(self.adapters) || !self.adapters.exists(adapter, adapter.name == self.name || "
        "(has(self.aliases) && adapter.name in self.aliases))",
        "model.adapters: an adapter needs a name that the model does not have",
    ),
)
WORKER_RULES = rules(*gpu_rules("worker"), *ENGINE_RULES)
ROOT_RULES = rules(*NAME_RULES, ADAPTER_RULE)


ModelName = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9._/]*[A-Za-z0-9])?$")
]
Origin = Annotated[str, Field(max_length=253, pattern=r"^(\*|https?://[^/\s]+)$")]
GraceSeconds = Annotated[int, Field(ge=1, le=86_400)]


class ServedAdapter(Spec):
    """A LoRA adapter that is served beside the model."""

    name: ModelName
    """What clients put into `model` to ask it."""
    source: ClaimLocation
    """Its directory in PEFT's layout, such as OUTPUT/adapter of a Yuan2FineTune with the same base."""


class ServiceModel(Spec):
    """The model to serve."""

    name: ModelName
    """What clients put into `model`."""
    aliases: Annotated[list[ModelName], Field(max_length=16)] = Field(default_factory=list)
    """Other names of the same model, such as gpt-3.5-turbo, for clients whose model name cannot be
    changed."""
    fine_tune_ref: LocalObjectReference | None = None
    """A Yuan2FineTune of the same namespace; its model is served once it is complete."""
    source: ClaimLocation | None = None
    """A model directory: config.json, weights and tokenizer in the published layout."""
    adapters: Annotated[list[ServedAdapter], Field(max_length=32, json_schema_extra=list_map("name"))] = (
        Field(default_factory=list)
    )
    """LoRA adapters that vLLM serves beside the model, in the same batch."""


class Placement(Spec):
    """Where pods may run, and what they get."""

    resources: Resources = Field(default_factory=ResourceRequirements)
    """CPU, memory and other resources of each pod, besides GPUs."""
    node_selector: NodeLabels = Field(default_factory=dict)
    """Labels that the nodes must have."""
    tolerations: Tolerations = Field(default_factory=list)
    """Taints that the pods tolerate."""
    affinity: Affinity | None = None
    """Affinity rules of the pods."""
    priority_class_name: DnsName | None = None
    """PriorityClass of the pods."""
    pod_template: PodTemplate | None = None
    """Any other field of the pods. It wins over the fields above; what the operator decides is rejected."""


class ServiceWorker(Placement):
    """The pods that run the model."""

    replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    """Pods; `kubectl scale` and autoscalers change this field."""
    engine: EngineChoice = "auto"
    """What computes the answers: `vllm`, or the small `builtin`, which is ready in seconds; `auto` is vllm
    where there are GPUs."""
    image: ImageReference | None = None
    """Image of these pods; absent, `spec.image`, or that of the operator's settings for the engine."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of each pod; 0 computes on the CPU. With more than one, vLLM splits each layer among them (tensor
    parallel); their number must divide half the number of the model's heads."""
    gpu_resource: ResourceName = GPU_RESOURCE
    """The resource that `gpusPerWorker` counts: another vendor's GPUs, or a MIG profile."""
    precision: ServePrecision = "bf16"
    """Type of weights and activations."""
    max_model_length: PositiveInt | None = None
    """Prompt and answer together, in tokens; absent, what the model's config.json allows."""
    max_concurrent_requests: PositiveInt = 64
    """Requests per pod that may run or wait; any further one is answered with 429."""
    gpu_memory_utilization: Share | None = None
    """Share of a GPU's memory that vLLM takes for weights, activations and caches; absent, vLLM's default."""
    quantization: Quantization | None = None
    """How vLLM quantises the weights, in its words, such as `fp8`; absent, not at all, or as config.json
    says."""
    prefix_caching: bool | None = None
    """Whether vLLM keeps the caches of prompts' beginnings; absent, it does."""
    engine_args: Annotated[EngineArguments, Field(json_schema_extra=rules(*ARGUMENT_RULES))] = Field(
        default_factory=dict
    )
    """Other options of vLLM's command line, without the dashes in front; a switch has the value "true" or
    "false". vLLM's own parser checks them before a pod loads the model."""
    termination_grace_period_seconds: GraceSeconds = 120
    """Seconds that a terminating pod may take to finish the answers it has begun."""


class ServiceController(Placement):
    """FastChat's controller, which knows the workers; it keeps its state in memory, so there is one."""

    dispatch: DispatchMethod = "shortest_queue"
    """How a worker is chosen for a request."""


class ServiceApi(Placement):
    """The OpenAI-compatible server."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods."""
    port: Port = PORT_API
    """Port of the pods and of the Service."""
    keys_secret: LocalObjectReference | None = None
    """A Secret whose values are API keys; usage is counted under the name of each value. Absent, no key is
    required."""
    cors_origins: Annotated[list[Origin], Field(max_length=32)] = Field(default_factory=list)
    """Origins of web pages whose scripts may call the API, such as https://app.example; `*` for all."""
    termination_grace_period_seconds: GraceSeconds = 120
    """Seconds that a terminating pod may take to finish the answers it is passing on."""


class ServiceWeb(Placement):
    """FastChat's web page to try the model; with `api.keysSecret` it asks for a key as the password."""

    enabled: bool = False
    """Whether to run the web page."""
    port: Port = PORT_WEB
    """Port of the pod and of the Service."""


class NetworkPeer(Spec):
    """Other pods, by their labels and those of their namespace; both must hold."""

    pod_selector: LabelSelector | None = None
    """The pods; absent, all."""
    namespace_selector: LabelSelector | None = None
    """Their namespaces; absent, the service's own."""


ONE_SELECTOR = rules(
    (
        "has(self.podSelector) || has(self.namespaceSelector)",
        "networkPolicy.allowFrom: name podSelector, namespaceSelector or both",
    )
)


class ServiceNetworkPolicy(Spec):
    """Who reaches controller and workers, which ask for no key."""

    enabled: bool = True
    """Only the service's own pods do, where the cluster's network enforces policies; false, everybody."""
    allow_from: Annotated[
        list[Annotated[NetworkPeer, Field(json_schema_extra=ONE_SELECTOR)]], Field(max_length=16)
    ] = Field(default_factory=list)
    """Others that do, such as Prometheus, or FastChat's own programs."""


class ServiceSpec(Spec):
    """What to serve, and with which pods."""

    model: Annotated[ServiceModel, Field(json_schema_extra=ONE_MODEL)]
    """The model to serve."""
    image: ImageReference | None = None
    """Server image of all pods; absent, the one of the operator's settings."""
    image_pull_policy: ImagePullPolicy | None = None
    """When the image is pulled; absent, Kubernetes decides by its tag."""
    image_pull_secrets: PullSecrets = Field(default_factory=list)
    """Secrets of the registry."""
    worker: Annotated[ServiceWorker, Field(json_schema_extra=WORKER_RULES)] = Field(
        default_factory=ServiceWorker
    )
    """The pods that run the model."""
    controller: ServiceController = Field(default_factory=ServiceController)
    """FastChat's controller."""
    api: ServiceApi = Field(default_factory=ServiceApi)
    """The OpenAI-compatible server."""
    web: ServiceWeb = Field(default_factory=ServiceWeb)
    """FastChat's web page."""
    network_policy: ServiceNetworkPolicy = Field(default_factory=ServiceNetworkPolicy)
    """Who reaches controller and workers."""


class ServedModel(ModelReference):
    """The model directory of a service, and where it is from."""

    fine_tune: str | None = None
    """The Yuan2FineTune that made it; absent, the directory is named in the spec itself."""


class ServiceStatus(Status):
    """Where a service stands."""

    observed_generation: int | None = None
    """metadata.generation of the spec that this status is about."""
    phase: ServicePhase | None = None
    """The conditions in one word."""
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """Accepted, Ready, Progressing, Degraded."""
    url: str | None = None
    """Base URL for OpenAI clients inside the cluster."""
    workers: str | None = None
    """Ready worker pods of those wanted: `1/1`."""
    worker_replicas: int = 0
    """Worker pods that exist."""
    ready_workers: int = 0
    """Worker pods that answer."""
    selector: str | None = None
    """Label selector of the worker pods, for autoscalers."""
    model: ServedModel | None = None
    """The model directory that is served."""


SCALE: dict[str, Any] = {
    "specReplicasPath": ".spec.worker.replicas",
    "statusReplicasPath": ".status.workerReplicas",
    "labelSelectorPath": ".status.selector",
}

PRINTER_COLUMNS: list[dict[str, Any]] = [
    {"name": "Model", "type": "string", "jsonPath": ".spec.model.name"},
    {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
    {"name": "URL", "type": "string", "jsonPath": ".status.url"},
    {"name": "Workers", "type": "string", "jsonPath": ".status.workers"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {
        "name": "Message",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="Ready")].message',
        "priority": 1,
    },
]
