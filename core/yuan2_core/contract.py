"""The JSON that crosses a pod's border.

The operator writes one `TrainJob` or `ServeJob` into a ConfigMap; a pod reads it at `JOB_FILE` and nothing
else. Rank 0 of a training answers `GET /progress` with a `Progress`; a container that ends leaves a
`Termination` in its termination log. The sections that a user also writes in a
custom resource are in `sections`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from yuan2_core.document import Contract
from yuan2_core.engine import VllmOptions
from yuan2_core.exit_codes import EXIT_COMPLETE as EXIT_COMPLETE
from yuan2_core.exit_codes import EXIT_CRASHED as EXIT_CRASHED
from yuan2_core.exit_codes import EXIT_INVALID as EXIT_INVALID
from yuan2_core.exit_codes import EXIT_PREEMPTED as EXIT_PREEMPTED
from yuan2_core.sections import (
    Checkpoint,
    DataFile,
    DatasetFormat,
    DeepSpeed,
    Device,
    Evaluation,
    Fraction,
    Method,
    ModelSize,
    Objective,
    PositiveInt,
    ServePrecision,
    Training,
)

JOB_FILE = PurePosixPath("/etc/yuan2/job.json")
KEYS_DIRECTORY = PurePosixPath("/etc/yuan2/keys")
TERMINATION_LOG = PurePosixPath("/dev/termination-log")
TERMINATION_LIMIT = 4096
"""Bytes of a termination message that the kubelet keeps."""

PORT_RENDEZVOUS = 23456
PORT_PROGRESS = 9390
PORT_STACKS = PORT_PROGRESS + 1
"""Of the pods beside that of rank 0, which answers for its stacks on `PORT_PROGRESS`."""
PORT_CONTROLLER = 8503
PORT_WORKER = 8504
PORT_API = 8505
PORT_WEB = 7860


PEERS_MISSING = "PeersMissing"
"""`Termination.reason` of a pod that waited in vain for the others: it has not begun."""
PEER_LOST = "PeerLost"
"""`Termination.reason` of a pod that only noticed that another one had gone: the cause is elsewhere."""


class ModelLocation(Contract):
    """A model directory as the pod sees it."""

    size: ModelSize
    """A preset, whose dimensions `config.json` must match, or `custom` for any dimensions."""
    path: str
    """Directory with config.json, weights and tokenizer in the published layout."""


class DatasetLocation(Contract):
    """Conversations as the pod sees them."""

    path: str
    """A file of data, or a directory of such files."""
    format: DatasetFormat = "auto"
    """Layout of a record."""
    files: tuple[DataFile, ...] = ()
    """Which files below the directory `path`, each with its format and weight; none for all."""
    max_invalid_fraction: Fraction = 0.0
    """Largest share of records (and of sequences left without a label) that may be dropped before the run
    stops."""
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
    objective: Objective = Field(default_factory=Objective)
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
    vllm: VllmOptions | None = None
    """Settings of vLLM, which computes the answers; absent, the built-in engine does."""
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

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may put into `model`: the model's names and those of adapters."""
        adapters = () if self.worker.vllm is None else tuple(self.worker.vllm.adapters)
        return (self.served_name, *self.aliases, *adapters)
