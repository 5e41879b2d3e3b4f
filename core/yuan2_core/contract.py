"""The JSON that crosses a pod's border.

The operator writes one `TrainJob` or `ServeJob` into a ConfigMap; a pod reads it at `JOB_FILE` and nothing
else. Rank 0 of a training answers `GET /progress` with a `Progress`; a container that ends leaves a
`Termination` in its termination log. The sections that a user also writes in a custom resource (`Training`,
`DeepSpeed`, `Checkpoint`, `Method`) are the same classes there, so that a field cannot mean two things.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from yuan2_core.document import Contract

JOB_FILE = PurePosixPath("/etc/yuan2/job.json")
KEYS_DIRECTORY = PurePosixPath("/etc/yuan2/keys")
TERMINATION_LOG = PurePosixPath("/dev/termination-log")
TERMINATION_LIMIT = 4096
"""Bytes of a termination message that the kubelet keeps."""

PORT_RENDEZVOUS = 23456
PORT_PROGRESS = 9390
PORT_CONTROLLER = 8503
PORT_WORKER = 8504
PORT_API = 8505
PORT_WEB = 7860

DEFAULT_WARMUP_RATIO = 0.03
"""Share of warm-up steps when neither `warmupRatio` nor `warmupSteps` is given (published recipe)."""
DEFAULT_EPOCHS = 3.0
"""Passes over the data when neither `epochs` nor `maxSteps` is given (published recipe)."""

EXIT_COMPLETE = 0
EXIT_CRASHED = 1
EXIT_PREEMPTED = 75
"""SIGTERM was obeyed: a checkpoint was written, the next attempt goes on from it (EX_TEMPFAIL)."""
EXIT_INVALID = 78
"""The job, its model or its data can never work as they are: not retried (EX_CONFIG)."""

PEERS_MISSING = "PeersMissing"
"""`Termination.reason` of a pod that waited in vain for the others: it has not begun."""
PEER_LOST = "PeerLost"
"""`Termination.reason` of a pod that only noticed that another one had gone: the cause is elsewhere."""

WITHOUT_FP16 = (
    "fp16 cannot train Yuan 2.0: its weights are bf16, whose range fp16 does not have, so that "
    "activations and gradients overflow; use bf16, or fp32 where a GPU has no bf16"
)


def _without_fp16(value: object) -> object:
    if value == "fp16":
        raise ValueError(WITHOUT_FP16)
    return value


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{', '.join(values)}: name each only once")
    return values


ModelSize = Literal["2B", "51B", "102B", "custom"]
LossMode = Literal["efficient", "last_response", "split_example"]
DatasetFormat = Literal["auto", "fastchat", "alpaca", "belle"]
Schedule = Literal["cosine", "linear", "constant"]
TrainPrecision = Annotated[
    Literal["bf16", "fp32"],
    BeforeValidator(_without_fp16),
    Field(json_schema_extra={"whyNotOthers": WITHOUT_FP16}),
]
ServePrecision = Literal["bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]
Offload = Literal["none", "optimizer", "parameters"]
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

INT_LIMIT = 2**31 - 1
"""The largest whole number that a field takes."""
PositiveInt = Annotated[int, Field(ge=1, le=INT_LIMIT)]
NaturalInt = Annotated[int, Field(ge=0, le=INT_LIMIT)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Full(Contract):
    """Train every parameter."""


class LoRA(Contract):
    """Train low-rank matrices beside frozen linear layers (arXiv 2106.09685)."""

    r: PositiveInt = 8
    """Rank of the matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of their product, divided by r (by its square root with `rsLora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of a layer's inputs that the matrices do not see in a step."""
    target_modules: Annotated[
        tuple[TargetModule, ...],
        Field(min_length=1, max_length=7, json_schema_extra={"uniqueItems": True}),
        AfterValidator(_distinct),
    ] = ("q_proj", "v_proj")
    """Layers that get matrices. In Yuan 2.0 `q_proj` holds queries and keys of the first half of the heads
    and `k_proj` those of the second half: name both or neither to treat all heads alike."""
    rs_lora: bool = False
    """Divide alpha by the square root of r (arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitude of the weights as well (arXiv 2402.09353)."""


class QLoRA(LoRA):
    """LoRA beside weights kept in nf4 with double quantisation, computed in bf16 (arXiv 2305.14314)."""


class Method(Contract):
    """How parameters are trained: exactly one member is set."""

    full: Full | None = None
    """Train every parameter."""
    lora: LoRA | None = None
    """Train low-rank matrices beside frozen weights."""
    qlora: QLoRA | None = None
    """The same beside 4-bit weights."""


class Training(Contract):
    """Hyperparameters; the defaults are those of the published Yuan 2.0 recipe."""

    loss: LossMode = "split_example"
    """Which tokens of a multi-turn conversation are learned: every answer (`efficient`), the last one
    (`last_response`), or each answer in a sequence of its own (`split_example`)."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; 3 when neither `epochs` nor `maxSteps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    max_length: Annotated[int, Field(ge=8, le=INT_LIMIT)] = 1024
    """Longest sequence in tokens; a longer one loses its oldest turns."""
    micro_batch_size: PositiveInt = 4
    """Sequences a process takes through the model at once; with `packing`, rows of `maxLength` at most."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro batches of each process that make one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""
    warmup_ratio: Fraction | None = None
    """Share of the steps in which the learning rate rises from 0; 0.03 when neither it nor `warmupSteps` is
    given."""
    warmup_steps: NaturalInt | None = None
    """Steps in which the learning rate rises from 0, instead of `warmupRatio`."""
    schedule: Schedule = "cosine"
    """What the learning rate does after the warm-up."""
    packing: bool = True
    """Put several sequences into one row of up to `maxLength` tokens, each seeing only itself; off, rows are
    padded. A batch counts sequences either way, so that only the time of a step changes."""
    gradient_checkpointing: bool = True
    """Keep only each layer's input and compute the layer again in the backward pass."""
    gradient_checkpointing_every: PositiveInt = 1
    """Of so many layers one is computed again: 1 saves the most memory, 2 half as much at half the cost."""
    tf32: bool = True
    """Let GPUs multiply fp32 matrices in TF32."""
    precision: TrainPrecision = "bf16"
    """`bf16` or `fp32`: type of the weights in forward and backward; the optimizer keeps fp32 either way."""
    seed: NaturalInt = 42
    """Seed of the order of the data."""


class DeepSpeed(Contract):
    """The part of DeepSpeed's configuration that a user decides."""

    stage: Literal[0, 2, 3] | None = None
    """ZeRO stage; absent, `model.size` decides: 2 for 2B and custom, 3 for 51B and 102B; 0 for QLoRA."""
    offload: Offload = "none"
    """What waits in the memory of the CPU: nothing, the optimizer's state, or the parameters as well
    (ZeRO-3)."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Sections merged over the configuration that the trainer makes; a key that another field decides is
    refused."""
    flops_profiler: bool = False
    """Let DeepSpeed's profiler print the FLOPs of each module at the second step, as the published recipe
    does."""


class Checkpoint(Contract):
    """How often a run can be picked up again."""

    every_steps: PositiveInt = 1200
    """Optimizer steps between two checkpoints."""
    every_seconds: Annotated[int, Field(ge=60, le=INT_LIMIT)] = 1800
    """Seconds after which a checkpoint is written between those of `everySteps`, at the end of a step."""
    keep: Annotated[PositiveInt, Field(json_schema_extra={"decidedBySize": True})] = 10
    """Complete checkpoints of `everySteps` that are kept; the oldest goes first. Of others only the newest
    is. Absent, 10, but of full 51B and 102B runs, whose checkpoints take 0.6 and 1.2 TB, 3 and 2."""


class Evaluation(Contract):
    """How a run is judged while it trains, on data held out of training."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations; absent, one at the end of each epoch."""
    early_stopping_patience: PositiveInt | None = None
    """Evaluations in a row without a lower loss after which training ends; absent, it does not."""
    sample_answers: Annotated[int, Field(ge=0, le=64)] | None = None
    """Held-out questions that the model answers before and after training, for `samples.jsonl`; absent, 4
    where data is held out."""


class ModelLocation(Contract):
    """A model directory as the pod sees it."""

    size: ModelSize
    """A preset whose dimensions `config.json` must have, or `custom` for whatever it has."""
    path: str
    """Directory with config.json, weights and tokenizer in the published layout."""


class DatasetLocation(Contract):
    """Conversations as the pod sees them."""

    path: str
    """A JSON or JSON Lines file."""
    format: DatasetFormat = "auto"
    """Layout of a record."""
    max_invalid_fraction: Fraction = 0.0
    """Share of records (and of sequences left without a label) that may be dropped; more stops the run."""
    eval_path: str | None = None
    """Conversations to evaluate on, in the same format."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the conversations held out of training to evaluate on, instead of `evalPath`."""


class Launch(Contract):
    """The processes of one attempt."""

    nodes: PositiveInt
    """Pods; the pod's completion index is its node rank."""
    processes_per_node: PositiveInt
    """Processes a pod: one a GPU, or as many CPU processes as the user asked for."""
    device: Device
    """What the processes compute on; gloo on `cpu`, NCCL on `cuda`."""
    rendezvous_seconds: PositiveInt = 900
    """Longest time that a pod waits for the others; some may wait for a node, a volume or an image."""


class TrainJob(Contract):
    """Everything one attempt of a fine-tuning needs to know."""

    version: Literal[1] = 1
    name: str
    """Name of the Yuan2FineTune."""
    namespace: str
    uid: str
    attempt: PositiveInt
    """1 for the first set of pods; each restart is one more."""
    model: ModelLocation
    dataset: DatasetLocation
    method: Method
    training: Training
    stage: Literal[0, 2, 3]
    """ZeRO stage, resolved."""
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    checkpoint: Checkpoint
    evaluation: Evaluation = Field(default_factory=Evaluation)
    output: str
    """Directory for checkpoints/, metrics.jsonl and the exported model."""
    merge_adapter: bool = False
    """LoRA and QLoRA: write base and adapter merged to `<output>/model`, beside `<output>/adapter`."""
    tensorboard: bool = False
    """Write TensorBoard logs to `<output>/tensorboard`."""
    launch: Launch
    progress_port: PositiveInt = PORT_PROGRESS


TrainState = Literal[
    "starting",
    "preparing",
    "loading",
    "training",
    "evaluating",
    "saving",
    "exporting",
    "complete",
    "preempted",
    "failed",
]


class Measurements(Contract):
    """What rank 0 knows of a run after a step."""

    state: TrainState
    step: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps done, those of earlier attempts included."""
    total_steps: Annotated[int, Field(ge=0)] = 0
    epoch: float = 0.0
    loss: float | None = None
    """Mean loss over the labelled tokens of the last step's global batch."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None
    """Mean loss over the labelled tokens of the held-out data, at the last evaluation."""
    best_step: int | None = None
    """Step of the lowest `evalLoss` so far, that before the first step left out."""
    mfu: float | None = None
    """Model FLOPs a second of step time over the peak of the GPUs; absent on CPU."""
    memory_bytes: int | None = None
    """Highest memory of a process: allocated on its GPU, resident on CPU."""
    tokens_per_second: float | None = None
    """Tokens (labelled or not, padding not counted) of all ranks a second of step time, over recent steps."""
    samples: int = 0
    """Sequences to train on."""
    tokens: int = 0
    """Tokens of those sequences."""
    dropped_samples: int = 0
    """Sequences left without a label and records refused, within maxInvalidFraction."""
    resumed_from_step: int | None = None
    last_checkpoint_step: int | None = None
    seconds_in_steps: float = 0.0
    """Wall time of this attempt inside optimizer steps."""
    message: str = ""


class Progress(Measurements):
    """What rank 0 answers on `GET /progress`."""

    version: Literal[1] = 1
    name: str
    attempt: PositiveInt
    eta_seconds: float | None = None
    last_step_age_seconds: float | None = None
    """Seconds since the last sign of life (an optimizer step, a micro batch of an evaluation, a tensor of the
    export): grows when a rank hangs."""
    state_age_seconds: float | None = None
    """Seconds since `state` last changed, by the pod's own clock; absent from older trainers."""
    seconds_total: float = 0.0
    """Wall time of this attempt since its process started."""


class Termination(Contract):
    """What a container leaves in its termination log, at most `TERMINATION_LIMIT` bytes."""

    reason: str
    """CamelCase, fit for a condition: Complete, Preempted, InvalidData, InvalidModel, InvalidJob, OutputFull,
    Superseded, Crashed or `PEER_LOST`."""
    message: str
    """One sentence: what, where (file, record, field), and the way out."""
    progress: Progress | None = None


class WorkerJob(Contract):
    """The model worker of a service."""

    port: PositiveInt = PORT_WORKER
    controller_url: str
    """FastChat's controller, `http://host:port`."""
    device: Device
    gpus: Annotated[int, Field(ge=0)] = 0
    precision: ServePrecision
    max_model_length: PositiveInt | None = None
    """Prompt and answer together, in tokens; absent, what the model's config.json allows."""
    max_concurrent_requests: PositiveInt = 64
    """Requests that run or wait; one more is refused with FastChat's rate-limit code."""


class ApiJob(Contract):
    """The OpenAI-compatible server of a service."""

    port: PositiveInt = PORT_API
    controller_url: str
    require_key: bool = False
    """Every route that works wants a key from `KEYS_DIRECTORY` (a file a key, from a Secret)."""
    max_choices: PositiveInt = 64
    """Answers that one request may ask for: what a worker takes at once."""
    cors_origins: tuple[str, ...] = ()
    """Web pages whose scripts may ask, as origins; `*` for all."""


class ServeJob(Contract):
    """Everything the pods of one Yuan2Service need to know."""

    version: Literal[1] = 1
    name: str
    namespace: str
    uid: str
    served_name: str
    """What clients put into `model`."""
    aliases: tuple[str, ...] = ()
    """Other names of the same model."""
    model_path: str
    """Directory with config.json, weights and tokenizer in the published layout."""
    adapter_path: str | None = None
    """A LoRA adapter in PEFT's layout, merged into the model when it is loaded."""
    worker: WorkerJob
    api: ApiJob
