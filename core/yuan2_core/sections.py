"""Sections of a fine-tuning that a user writes in a custom resource and a pod reads in its job file: the same
classes in both places, so that a field cannot mean two things.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from yuan2_core.document import Contract

DEFAULT_WARMUP_RATIO = 0.03
"""Share of warm-up steps when neither `warmupRatio` nor `warmupSteps` is given (published recipe)."""
DEFAULT_DECAY_RATIO = 0.1
"""Share of the steps in which schedule `wsd` falls when neither `decayRatio` nor `decaySteps` is given."""
DEFAULT_EPOCHS = 3.0
"""Passes over the data when neither `epochs` nor `maxSteps` is given (published recipe)."""

WITHOUT_FP16 = (
    "fp16 cannot train Yuan 2.0: its weights are bf16, whose range fp16 does not have, so that "
    "activations and gradients overflow; use bf16, or fp32 where a GPU has no bf16"
)


OUTSIDE = (
    "dataset.files: a path is relative to the directory of dataset.source and stays inside it: no '/' at "
    "either end, no '..'; '.' alone is the directory itself"
)


def _without_fp16(value: object) -> object:
    if value == "fp16":
        raise ValueError(WITHOUT_FP16)
    return value


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"{', '.join(values)}: name each only once")
    return values


def _below(path: str) -> str:
    if path != "." and any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(OUTSIDE)
    return path


def _layers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The layers that a list of targets means."""
    return LINEAR_LAYERS if ALL_LINEAR in names else _distinct(names)


ModelSize = Literal["2B", "51B", "102B", "custom"]
LossMode = Literal["efficient", "last_response", "split_example"]
DatasetFormat = Literal["auto", "fastchat", "openai", "alpaca", "belle", "trl", "text"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
TrainPrecision = Annotated[
    Literal["bf16", "fp32"],
    BeforeValidator(_without_fp16),
    Field(json_schema_extra={"whyNotOthers": WITHOUT_FP16}),
]
ServePrecision = Literal["bf16", "fp16", "fp32"]
Device = Literal["cuda", "cpu"]
Offload = Literal["none", "optimizer", "parameters"]
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
"""PEFT's name for all of `LINEAR_LAYERS`."""
TargetModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"
]

INT_LIMIT = 2**31 - 1
"""The largest whole number that a field takes."""
PositiveInt = Annotated[int, Field(ge=1, le=INT_LIMIT)]
NaturalInt = Annotated[int, Field(ge=0, le=INT_LIMIT)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class DataFile(Contract):
    """One of several files of a data set."""

    path: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_below)]
    """A file or directory, relative to the directory that the source names."""
    format: DatasetFormat = "auto"
    """Layout of its records; `auto` looks at the first one of each file."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each of its records is in an epoch: 2 for twice, 0.5 for every second record."""


class Full(Contract):
    """Train every parameter."""


class LoRA(Contract):
    """Train low-rank matrices beside frozen linear layers (arXiv 2106.09685)."""

    r: PositiveInt = 8
    """Rank of the matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of their product, divided by r (by its square root with `rsLora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the inputs of the matrices."""
    target_modules: Annotated[
        tuple[TargetModule, ...],
        Field(min_length=1, max_length=7, json_schema_extra={"uniqueItems": True}),
        AfterValidator(_layers),
    ] = ("q_proj", "v_proj")
    """Layers that get matrices; `all-linear` for all seven. In Yuan 2.0 `q_proj` holds queries and keys of
    the first half of the heads and `k_proj` those of the second: name both or neither to treat all heads
    alike."""
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
    """The same, with the frozen weights in 4 bits."""


class SFT(Contract):
    """Learn answers as they stand (supervised fine-tuning)."""


class DPO(Contract):
    """Prefer one of two answers, measured against the model that training starts from (arXiv 2305.18290)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How far the model may move from the one it starts from: the higher, the less."""
    # Not lt=0.5: the API server cuts a bound to whole numbers where the value is one, and refused 0.
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = 0.0
    """Share of the pairs whose two answers may have been swapped (conservative DPO)."""


class ORPO(Contract):
    """Learn the preferred answer and the odds of it against the other, without a reference (arXiv
    2403.07691)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds beside the loss of the preferred answer (the paper's lambda)."""


class KTO(Contract):
    """Learn from single answers that are marked as desirable or not (arXiv 2402.01306)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """As that of DPO."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of a desirable answer's loss."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of an undesirable one's."""


class Objective(Contract):
    """What is learned: at most one member is set; without one, `sft`."""

    sft: SFT | None = None
    """Answers as they stand."""
    dpo: DPO | None = None
    """Which of two answers is preferred, against the model that training starts from."""
    orpo: ORPO | None = None
    """The preferred answer, and its odds against the other one."""
    kto: KTO | None = None
    """Which single answers are desirable."""

    @property
    def settings(self) -> SFT | DPO | ORPO | KTO:
        """The member that is set."""
        return self.dpo or self.orpo or self.kto or SFT()

    @property
    def sequences(self) -> int:
        """Sequences of what a batch counts: two of a pair, and of a marked answer and the one beside it that
        its reward is measured from."""
        return 1 if isinstance(self.settings, SFT) else 2


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
    """Sequences that each process computes at once; with `packing`, in rows of at most `maxLength` tokens."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro batches per process in one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the mean gradient of earlier steps AdamW keeps."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """How much of the mean squared gradient of earlier steps it keeps."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """What it adds to the root of that mean."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns clipping off."""
    warmup_ratio: Fraction | None = None
    """Share of the steps in which the learning rate rises from 0; 0.03 when neither it nor `warmupSteps` is
    given."""
    warmup_steps: NaturalInt | None = None
    """Steps in which the learning rate rises from 0, instead of `warmupRatio`."""
    schedule: Schedule = "cosine"
    """What the learning rate does after the warm-up: it falls as a cosine or a line, stays, or stays and
    falls as a cosine at the end (`wsd`: warm-up, stable, decay)."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """What the learning rate falls to."""
    decay_ratio: Fraction | None = None
    """With `wsd`: share of the steps in which the rate falls; 0.1 without it and `decaySteps`."""
    decay_steps: PositiveInt | None = None
    """With `wsd`: the last steps, in which the rate falls, instead of `decayRatio`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label's weight that is spread over the vocabulary; off in evaluation. With `sft` only."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Size of the noise on embeddings in training (NEFTune, arXiv 2310.05914); 0 for none, 5 is usual."""
    packing: bool = True
    """Put several sequences into one row of up to `maxLength` tokens, each seeing only itself; off, rows are
    padded. A batch is counted in sequences either way, so only the time per step changes."""
    gradient_checkpointing: bool = True
    """Keep only each layer's input and recompute the layer in the backward pass."""
    gradient_checkpointing_every: PositiveInt = 1
    """One layer in this many is recomputed: 1 saves the most memory, 2 half as much at half the cost."""
    tf32: bool = True
    """Let GPUs multiply fp32 matrices in TF32."""
    precision: TrainPrecision = "bf16"
    """`bf16` or `fp32`: type of the weights in forward and backward; the optimizer keeps fp32 either way."""
    fp32_gradients: bool = False
    """Reduce gradients over ranks and add them up over micro batches in fp32 instead of `precision`: with
    many micro batches a step, small contributions are not rounded away. Takes 2 more bytes for each trained
    parameter of a rank and twice the traffic of gradients; needs ZeRO-2 or ZeRO-3."""
    seed: NaturalInt = 42
    """Seed of the order of the data."""


class DeepSpeed(Contract):
    """The part of DeepSpeed's configuration that a user decides."""

    stage: Literal[0, 2, 3] | None = None
    """ZeRO stage; absent, `model.size` decides: 2 for 2B and custom, 3 for 51B and 102B; 0 for QLoRA."""
    offload: Offload = "none"
    """What is kept in CPU memory: nothing, the optimizer's state, or the parameters as well (ZeRO-3)."""
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
    """Seconds after which a checkpoint is written even before `everySteps` is reached, at the end of a
    step."""
    keep: Annotated[PositiveInt, Field(json_schema_extra={"decidedBySize": True})] = 10
    """Complete checkpoints of `everySteps` to keep; the oldest is deleted first. Of all others, only the
    newest is kept. Absent, 10; for full fine-tuning of 51B and 102B, whose checkpoints take 0.6 and 1.2 TB, 3
    and 2."""


class Evaluation(Contract):
    """How a run is judged while it trains, on data held out of training."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations; absent, one at the end of each epoch."""
    early_stopping_patience: PositiveInt | None = None
    """Training ends after this many evaluations in a row without a lower loss; absent, it never ends
    early."""
    sample_answers: Annotated[int, Field(ge=0, le=64)] | None = None
    """Held-out questions that the model answers before and after training, for `samples.jsonl`; absent, 4
    where data is held out, but none with ZeRO-3, which gathers the whole model for every token of them."""
