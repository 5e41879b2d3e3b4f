"""What contradicts itself in a fine-tuning: one sentence each, which names the field and the way out. Pure.

The operator refuses a resource with them before a pod starts, by rules of the CRD where those can see it; the
trainer refuses a job that came by another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from yuan2_core.contract import TrainJob
from yuan2_core.sections import DeepSpeed, LoRA, Method, Training

MethodName = Literal["full", "lora", "qlora"]

ONE_METHOD: Final = "method: set exactly one of full, lora and qlora, for example `full: {}`"
ONE_OBJECTIVE: Final = "objective: set at most one of sft, dpo, orpo and kto"
NO_ADAPTER: Final = (
    "output.mergeAdapter: method.full trains no adapter; leave mergeAdapter out, or train with method.lora"
)
QLORA_STAGE_3: Final = (
    "method.qlora: ZeRO-3 cannot cut 4-bit weights into pieces; set deepspeed.stage to 2 (the weights are a "
    "quarter of their size already), or use method.lora"
)
QLORA_PRECISION: Final = "method.qlora computes in bf16; set training.precision to bf16"
DORA_STAGE_3: Final = (
    "method: dora needs the norms of whole weights, which ZeRO-3 has cut into pieces; set deepspeed.stage to "
    "2, or dora to false"
)
ONE_LENGTH: Final = "training.epochs and training.maxSteps exclude each other: remove one"
ONE_WARMUP: Final = "training: warmupRatio and warmupSteps exclude each other; leave one out"
ONE_DECAY: Final = "training: decayRatio and decaySteps exclude each other; leave one out"
ONLY_WSD: Final = (
    "training: decayRatio and decaySteps say when schedule wsd begins to fall; set schedule to wsd, or leave "
    "them out"
)
RATE_STAYS: Final = (
    "training.minLearningRate: with schedule constant the rate never falls; set another schedule, or leave "
    "minLearningRate out"
)
RATE_RISES: Final = (
    "training.minLearningRate is above training.learningRate, which the rate falls from; lower one or raise "
    "the other"
)
SMOOTHED_ANSWERS: Final = (
    "training.labelSmoothing spreads the labels of answers that are learned as they stand (objective.sft); "
    "leave it out, or set objective.dpo.labelSmoothing"
)
NOT_CHECKPOINTED: Final = (
    "training.gradientCheckpointingEvery: gradientCheckpointing is false, no layer is computed again; leave "
    "one of the two out"
)
FP32_GRADIENTS: Final = (
    "training.fp32Gradients: without ZeRO, DeepSpeed adds bf16 gradients up in bf16; set deepspeed.stage to "
    "2, or training.precision to fp32"
)
OFFLOAD_PARAMETERS: Final = (
    "deepspeed.offload: parameters wait in the CPU's memory only with ZeRO-3, which 51B and 102B have by "
    "default; set deepspeed.stage to 3, or offload to optimizer"
)
OFFLOAD_OPTIMIZER: Final = (
    "deepspeed.offload: without ZeRO there is no optimizer state to offload; set deepspeed.stage to 2, or "
    "leave offload out"
)
FORMAT_OF_FILES: Final = "dataset: with files, each of them has its own format; move dataset.format there"
FILES_OF_CONFIG_MAP: Final = (
    "dataset.files: a key of a ConfigMap is one file; put the files into a persistentVolumeClaim, or leave "
    "files out"
)
ONE_HELD_OUT: Final = "dataset: evalFraction and evalSource exclude each other; leave one out"
NOTHING_HELD_OUT: Final = (
    "evaluation: everySteps, earlyStoppingPatience and sampleAnswers need data that is held out of training; "
    "set dataset.evalFraction or dataset.evalSource"
)

DECIDED: Final[Mapping[str, str]] = {
    "train_batch_size": "training.microBatchSize, training.gradientAccumulationSteps and workers",
    "train_micro_batch_size_per_gpu": "training.microBatchSize",
    "gradient_accumulation_steps": "training.gradientAccumulationSteps",
    "gradient_clipping": "training.maxGradNorm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "data_types": "training.fp32Gradients",
    "communication_data_type": "training.fp32Gradients",
    "optimizer": "training.learningRate, training.weightDecay and training.adam*",
    "scheduler": "training.schedule",
    "activation_checkpointing": "training.gradientCheckpointing",
    "tensorboard": "output.tensorboard",
    "flops_profiler.enabled": "deepspeed.flopsProfiler",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload",
    "zero_optimization.offload_param.device": "deepspeed.offload",
    "zero_optimization.cpu_offload": "deepspeed.offload",
    "zero_optimization.cpu_offload_param": "deepspeed.offload",
}
"""Keys of DeepSpeed's configuration, and the fields that decide them."""

PASSED_ON: Final = (
    "zero_optimization",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "timers",
    "aio",
    "csv_monitor",
    "wandb",
    "comet",
    "disable_allgather",
    "torch_autocast",
)
"""Sections and keys of DeepSpeed's configuration that have an effect in our trainer."""


def method_name(method: Method) -> MethodName | None:
    """The member that is set, `None` when it is not exactly one."""
    names: tuple[MethodName, ...] = ("full", "lora", "qlora")
    given = [name for name in names if getattr(method, name) is not None]
    return given[0] if len(given) == 1 else None


def adapter_of(method: Method) -> LoRA | None:
    """The adapter that a method trains, `None` when it trains all parameters."""
    return method.lora or method.qlora


def job_conflicts(job: TrainJob) -> Iterator[str]:
    """Everything that contradicts itself in a job, the most basic first."""
    yield from method_conflicts(job)
    yield from training_conflicts(job)
    yield from deepspeed_conflicts(job.deepspeed, job.stage)
    yield from evaluation_conflicts(job)


def method_conflicts(job: TrainJob) -> Iterator[str]:
    """Between the method, its ZeRO stage, its precision and its output."""
    method, adapter = job.method, adapter_of(job.method)
    if method_name(method) is None:
        yield ONE_METHOD
        return
    if job.merge_adapter and adapter is None:
        yield NO_ADAPTER
    if method.qlora is not None and job.stage == 3:
        yield QLORA_STAGE_3
    if method.qlora is not None and job.training.precision != "bf16":
        yield QLORA_PRECISION
    if adapter is not None and adapter.dora and job.stage == 3:
        yield DORA_STAGE_3


def training_conflicts(job: TrainJob) -> Iterator[str]:
    """Between hyperparameters that say the same thing twice."""
    training, objective = job.training, job.objective
    if sum(value is not None for _, value in objective) > 1:
        yield ONE_OBJECTIVE
    if training.epochs is not None and training.max_steps is not None:
        yield ONE_LENGTH
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        yield ONE_WARMUP
    yield from _rate_conflicts(training)
    if training.label_smoothing > 0 and objective.sequences > 1:
        yield SMOOTHED_ANSWERS
    if not training.gradient_checkpointing and training.gradient_checkpointing_every != 1:
        yield NOT_CHECKPOINTED
    if training.fp32_gradients and training.precision == "bf16" and job.stage == 0:
        yield FP32_GRADIENTS


def _rate_conflicts(training: Training) -> Iterator[str]:
    if training.decay_ratio is not None and training.decay_steps is not None:
        yield ONE_DECAY
    if training.schedule != "wsd" and (training.decay_ratio is not None or training.decay_steps is not None):
        yield ONLY_WSD
    if training.schedule == "constant" and training.min_learning_rate > 0:
        yield RATE_STAYS
    if training.min_learning_rate > training.learning_rate:
        yield RATE_RISES


def evaluation_conflicts(job: TrainJob) -> Iterator[str]:
    """Between the data, what is to be judged and what it is judged on."""
    data, evaluation = job.dataset, job.evaluation
    if data.files and data.format != "auto":
        yield FORMAT_OF_FILES
    if data.eval_path is not None and data.eval_fraction > 0:
        yield ONE_HELD_OUT
    asked = (evaluation.every_steps, evaluation.early_stopping_patience, evaluation.sample_answers)
    if any(asked) and data.eval_path is None and data.eval_fraction == 0:
        yield NOTHING_HELD_OUT


def deepspeed_conflicts(wanted: DeepSpeed, stage: int) -> Iterator[str]:
    """Offload that the stage cannot do, and overrides that contradict a field or have no effect."""
    if wanted.offload == "parameters" and stage != 3:
        yield OFFLOAD_PARAMETERS
    if wanted.offload == "optimizer" and stage < 2:
        yield OFFLOAD_OPTIMIZER
    for path in _paths(wanted.overrides):
        yield from _override_conflicts(path, wanted)


def _override_conflicts(path: str, wanted: DeepSpeed) -> Iterator[str]:
    section = path.partition(".")[0]
    for key, field in DECIDED.items():
        if path == key or path.startswith(key + "."):
            yield f"deepspeed.overrides: {path} is decided by {field}; set that instead"
            return
    if section not in PASSED_ON:
        known = ", ".join(PASSED_ON)
        yield f"deepspeed.overrides: {section} has no effect in this trainer; known are {known}"
        return
    if section == "flops_profiler" and not wanted.flops_profiler:
        yield f"deepspeed.overrides: {path} needs deepspeed.flopsProfiler: true"
    offloaded = path.split(".")[1:2]
    if offloaded == ["offload_optimizer"] and wanted.offload == "none":
        yield f"deepspeed.overrides: {path} needs deepspeed.offload: optimizer or parameters"
    if offloaded == ["offload_param"] and wanted.offload != "parameters":
        yield f"deepspeed.overrides: {path} needs deepspeed.offload: parameters"


def _paths(tree: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Dotted names of the leaves, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"
