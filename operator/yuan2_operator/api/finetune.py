"""Yuan2FineTune: data, a model and a method become a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from yuan2_core.sections import (
    Checkpoint,
    DataFile,
    DatasetFormat,
    DeepSpeed,
    Evaluation,
    Fraction,
    Method,
    ModelSize,
    Objective,
    PositiveInt,
    Training,
)
from yuan2_operator.api.common import ClaimLocation, ClaimPath, Condition, ModelReference
from yuan2_operator.api.finetune_rules import (
    DATASET,
    FILES_BELOW,
    NO_RESERVED_ENV,
    ONE_DEVICE,
    ONE_METHOD,
    ONE_OBJECTIVE,
    QUEUED,
    SPEC,
    TRAINING,
    one_source,
)
from yuan2_operator.api.pods import (
    Affinity,
    Environment,
    ImagePullPolicy,
    ImageReference,
    NodeLabels,
    PodTemplate,
    PullSecrets,
    ResourceName,
    ResourceRequirements,
    Resources,
    Tolerations,
)
from yuan2_operator.api.run_policy import RunPolicy
from yuan2_operator.api.schema import DnsName, Quantity, Spec, Status, Timestamp, list_map
from yuan2_operator.constants import GPU_RESOURCE

FineTunePhase = Literal["Pending", "Running", "Suspended", "Complete", "Failed"]
AttemptOutcome = Literal[
    "Succeeded", "Failed", "Disrupted", "Invalid", "Stalled", "Suspended", "DeadlineExceeded"
]

ATTEMPTS_KEPT = 10
"""Attempts that `status.attempts` remembers; the oldest goes first."""


class FineTuneModel(Spec):
    """The model that training starts from."""

    size: ModelSize
    """A preset, whose dimensions config.json must match, or `custom` for any dimensions."""
    source: ClaimLocation
    """The model directory: config.json, weights and tokenizer in the published layout."""


class ConfigMapKey(Spec):
    """A key of a ConfigMap of the same namespace, for small data."""

    name: DnsName
    """Name of the ConfigMap."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """Key whose value is a JSON or JSON Lines file."""


class DatasetSource(Spec):
    """Where conversations are: exactly one member."""

    persistent_volume_claim: ClaimPath | None = None
    """A file or directory in a PersistentVolumeClaim: JSON, JSON Lines or plain text, gzip or not."""
    config_map: ConfigMapKey | None = None
    """A key of a ConfigMap, for small data."""


class Dataset(Spec):
    """The conversations or texts to learn."""

    source: Annotated[DatasetSource, Field(json_schema_extra=one_source("dataset.source"))]
    """Where the conversations are."""
    format: DatasetFormat = "auto"
    """Layout of a record; `auto` looks at the first one of each file."""
    files: Annotated[tuple[DataFile, ...], Field(max_length=64, json_schema_extra=FILES_BELOW)] = ()
    """Which files of the directory that `source` names are read, each with its format and weight; absent, all
    that are called .json, .jsonl or .txt, or so and .gz."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the conversations held out of training for evaluation."""
    eval_source: (
        Annotated[DatasetSource, Field(json_schema_extra=one_source("dataset.evalSource"))] | None
    ) = None
    """Conversations in the same format to evaluate on, instead of `evalFraction`."""
    max_invalid_fraction: Fraction = 0.0
    """Largest share of records (and of sequences left without a label) that may be dropped before the run
    stops."""


class Workers(Spec):
    """The training pods."""

    replicas: Annotated[PositiveInt, Field(le=1024)] = 1
    """Pods, one per node."""
    gpus_per_worker: Annotated[PositiveInt, Field(le=64)] | None = None
    """GPUs of each pod, and as many processes."""
    gpu_resource: ResourceName = GPU_RESOURCE
    """The resource that `gpusPerWorker` counts: another vendor's GPUs, or a MIG profile."""
    processes_per_worker: Annotated[PositiveInt, Field(le=64)] | None = None
    """Processes of each pod on CPU, instead of `gpusPerWorker`."""
    image: ImageReference | None = None
    """Trainer image; absent, that of the attempt before, at first the one of the operator's settings."""
    image_pull_policy: ImagePullPolicy | None = None
    """When the image is pulled; absent, Kubernetes decides by its tag."""
    image_pull_secrets: PullSecrets = Field(default_factory=list)
    """Secrets of the registry."""
    resources: Resources = Field(default_factory=ResourceRequirements)
    """CPU, memory and other resources of each pod, besides its GPUs. If neither CPU nor memory is given, a
    pod requests one CPU and 4Gi per GPU, or 250m and 512Mi per process on CPU."""
    node_selector: NodeLabels = Field(default_factory=dict)
    """Labels that the nodes must have."""
    tolerations: Tolerations = Field(default_factory=list)
    """Taints that the pods tolerate."""
    affinity: Affinity | None = None
    """Affinity rules of the pods."""
    priority_class_name: DnsName | None = None
    """PriorityClass of the pods."""
    termination_grace_period_seconds: Annotated[PositiveInt, Field(le=86_400)] | None = None
    """Seconds between SIGTERM and SIGKILL, in which a checkpoint is written; absent, 180 for 2B, 600 for 51B,
    900 for 102B, 300 for custom."""
    shared_memory: Quantity = "64Gi"
    """Size limit of /dev/shm, which NCCL and data loaders use; what is used counts toward the pod's
    memory."""
    env: Annotated[Environment, Field(json_schema_extra=NO_RESERVED_ENV)] = Field(default_factory=list)
    """Additional environment variables, such as NCCL_*."""
    pod_template: PodTemplate | None = None
    """Any other field of the pods. It wins over the fields above; what the operator decides is rejected."""


class Output(ClaimLocation):
    """Where a run leaves its work, and what of it."""

    merge_adapter: bool = False
    """With `lora` and `qlora`: write base and adapter merged into one model as well, and serve that one."""
    tensorboard: bool = False
    """Write TensorBoard logs, to the directory `tensorboard`."""


class Scheduling(Spec):
    """Queues and gang schedulers of the cluster; without them the default scheduler places each pod."""

    queue_name: DnsName | None = None
    """LocalQueue of Kueue that admits the run; with gang `volcano`, Volcano's queue."""
    priority_class: DnsName | None = None
    """WorkloadPriorityClass of Kueue, or PriorityClass of Volcano's group."""
    gang: Literal["none", "coscheduling", "volcano"] | None = None
    """Scheduler that starts all pods or none: scheduler-plugins' coscheduling, or Volcano."""


class FineTuneSpec(Spec):
    """What to train, on what, how, with which pods, and where the result goes."""

    model_config = ConfigDict(json_schema_extra=SPEC)

    model: FineTuneModel
    """The model that training starts from."""
    dataset: Annotated[Dataset, Field(json_schema_extra=DATASET)]
    """The conversations to learn."""
    method: Annotated[Method, Field(json_schema_extra=ONE_METHOD)]
    """Which parameters are trained: exactly one member."""
    objective: Annotated[Objective, Field(json_schema_extra=ONE_OBJECTIVE)] = Field(default_factory=Objective)
    """What is learned from the data: at most one member; absent, `sft`."""
    training: Annotated[Training, Field(json_schema_extra=TRAINING)] = Field(default_factory=Training)
    """Hyperparameters; the defaults are those of the published Yuan 2.0 recipe."""
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    """Settings for DeepSpeed."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When checkpoints are written, and how many are kept."""
    workers: Annotated[Workers, Field(json_schema_extra=ONE_DEVICE)]
    """The training pods."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """How the run is evaluated while it trains, on the data held out of training."""
    output: Output
    """Directory for checkpoints, metrics and the exported model or adapter."""
    scheduling: Annotated[Scheduling, Field(json_schema_extra=QUEUED)] = Field(default_factory=Scheduling)
    """Queues and gang schedulers."""
    run_policy: RunPolicy = Field(default_factory=RunPolicy)
    """When the run stops, rests or starts again."""


class Attempt(Status):
    """One set of pods that trained, or tried to."""

    number: int
    """1 for the first; each restart is one more."""
    outcome: AttemptOutcome | None = None
    """How it ended; absent while it runs."""
    reason: str = ""
    """Why it ended, one CamelCase word."""
    message: str = ""
    """Which pod, why, what to do."""
    counted: bool = False
    """Whether it counts against `maxRestarts`."""
    start_time: Timestamp | None = None
    """When its Job was created."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that it began with, 0 for none; absent if its rank 0 was never heard."""
    checkpoint_step: int | None = None
    """Step of the newest complete checkpoint, as its rank 0 last said; 0 for none."""
    node: str | None = None
    """The node that its failure points to: a pod crashed there, or the node was lost."""
    gpu_hours: float | None = None
    """Hours of all its GPUs from the moment when all pods ran; absent on CPU."""
    image: str | None = None
    """Trainer image of its pods; the next attempt has the same one unless the spec names another."""
    running_time: Timestamp | None = None
    """When all of its pods were first seen to run; absent if they never did together."""
    end_time: Timestamp | None = None
    """When its end was seen."""


class RunEstimate(Status):
    """What a run will need, as far as its spec, its GPU and its data are known."""

    gpu: str | None = None
    """The GPU of `workers.nodeSelector`; absent, there are no hours and no verdict."""
    memory_per_gpu: str
    """Memory of each GPU that a monitor will show, a quantity."""
    host_memory_per_gpu: str | None = None
    """Memory of the host that `deepspeed.offload` takes for each GPU, a quantity."""
    hours: float | None = None
    """Hours of all optimizer steps; absent until the data have been read, unless `training.maxSteps` says how
    many."""
    hours_at_most: bool | None = None
    """The hours are those of full rows, since the data have not been read yet."""
    fits: bool | None = None
    """Whether the GPUs have that memory; if not, `Accepted` says what to change."""


class FineTuneStatus(Status):
    """Where a run stands."""

    observed_generation: int | None = None
    """metadata.generation of the spec that this status is about."""
    phase: FineTunePhase | None = None
    """The conditions in one word."""
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """Accepted, Running, Suspended, Complete, Failed, Finished, Stalled, Reconciling."""
    method: str | None = None
    """The method of the spec in one word."""
    step: int | None = None
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps of the whole run."""
    progress: str | None = None
    """`step/totalSteps`."""
    epoch: float | None = None
    """Passes over the data, two decimals."""
    loss: float | None = None
    """Mean loss of the last step, four decimals."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    eval_loss: float | None = None
    """Mean loss on the data held out of training at the last evaluation, four decimals."""
    best_step: int | None = None
    """Step of the lowest `evalLoss` so far."""
    tokens_per_second: float | None = None
    """Tokens of all ranks a second of step time."""
    mfu: float | None = None
    """Share of the GPUs' peak FLOPs that the model's arithmetic reaches, three decimals; absent on CPU."""
    peak_memory: str | None = None
    """Highest memory of a process, a quantity: allocated on its GPU, resident on CPU."""
    samples: int | None = None
    """Sequences to train on."""
    tokens: int | None = None
    """Tokens of those sequences."""
    dropped_samples: int | None = None
    """Sequences left without a label and records refused, within `maxInvalidFraction`."""
    estimate: RunEstimate | None = None
    """What the run will need, told before it starts; absent for `custom` models and for CPUs."""
    eta: str | None = None
    """Time left, rounded: `58m`."""
    attempt: int | None = None
    """Number of the newest attempt."""
    restarts: int = 0
    """Attempts that failed and were followed by another one."""
    restarts_used: int | None = None
    """Those of `restarts` that count against `maxRestarts` now."""
    disruptions: int = 0
    """Attempts that were preempted, evicted, drained, deleted or lost their node; none counts against
    `maxRestarts`."""
    disruption_reasons: dict[str, int] = Field(default_factory=dict)
    """`disruptions` by reason."""
    disruptions_without_progress: int = 0
    """Disruptions in a row without a newer checkpoint."""
    node_failures: dict[str, int] = Field(default_factory=dict)
    """Attempts whose failure points to a node, by node."""
    nodes: list[str] = Field(default_factory=list)
    """Nodes of the newest attempt whose pods all ran, by rank."""
    gpu_hours: float | None = None
    """GPU hours of all attempts; absent on CPU."""
    attempts: Annotated[
        list[Attempt], Field(max_length=ATTEMPTS_KEPT, json_schema_extra=list_map("number"))
    ] = Field(default_factory=list)
    """The last attempts, oldest first."""
    last_checkpoint_step: int | None = None
    """Step of the newest complete checkpoint."""
    last_checkpoint_time: Timestamp | None = None
    """When the operator first heard of it."""
    last_checkpoint_path: str | None = None
    """Its directory in the claim of `output`."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that the newest attempt began with."""
    start_time: Timestamp | None = None
    """When the first attempt was created."""
    first_step_time: Timestamp | None = None
    """When the first optimizer step was seen."""
    completion_time: Timestamp | None = None
    """When the run ended."""
    model: ModelReference | None = None
    """The exported model, once the run is complete."""


PRINTER_COLUMNS: list[dict[str, Any]] = [
    {"name": "Model", "type": "string", "jsonPath": ".spec.model.size"},
    {"name": "Method", "type": "string", "jsonPath": ".status.method"},
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Step", "type": "string", "jsonPath": ".status.progress"},
    {"name": "Loss", "type": "number", "jsonPath": ".status.loss"},
    {"name": "ETA", "type": "string", "jsonPath": ".status.eta"},
    {"name": "Attempt", "type": "integer", "jsonPath": ".status.attempt"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restarts"},
    {"name": "Disruptions", "type": "integer", "jsonPath": ".status.disruptions", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Eval Loss", "type": "number", "jsonPath": ".status.evalLoss", "priority": 1},
    {"name": "Tokens/s", "type": "number", "jsonPath": ".status.tokensPerSecond", "priority": 1},
    {"name": "GPU-hours", "type": "number", "jsonPath": ".status.gpuHours", "priority": 1},
    {"name": "MFU", "type": "number", "jsonPath": ".status.mfu", "priority": 1},
    {"name": "Memory", "type": "string", "jsonPath": ".status.peakMemory", "priority": 1},
    {
        "name": "Message",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="Running")].message',
        "priority": 1,
    },
]
