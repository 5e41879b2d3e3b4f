"""The estimate itself, for a run and for what a custom resource says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from yuan2_core.conflicts import MethodName
from yuan2_core.contract import Launch
from yuan2_core.estimate.advice import advise, fits, spoken_gb
from yuan2_core.estimate.duration import train_seconds
from yuan2_core.estimate.gpus import Gpu
from yuan2_core.estimate.memory import Memory, gpu_memory, host_memory
from yuan2_core.estimate.run import Data, Dimensions, Run, Shape, Stage
from yuan2_core.presets import PRESETS
from yuan2_core.sections import Offload, Training


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        memory: bytes of each GPU, part by part.
        host_bytes_per_gpu: bytes of the host's memory that offloading takes for each GPU.
        hours: of all optimizer steps; None when the GPU, or both steps and data, are not known.
        at_most: the hours are those of full rows, since the data are not known.
        fits: None when the GPU is not known.
        advice: one sentence on what to change when it does not fit, else empty.
    """

    memory: Memory
    host_bytes_per_gpu: float
    hours: float | None
    at_most: bool
    fits: bool | None
    advice: str

    @property
    def memory_bytes_per_gpu(self) -> float:
        """What a monitor will show for each GPU."""
        return self.memory.total

    @property
    def summary(self) -> str:
        """`about 44 GB per GPU, 21 h`, for a condition's sentence."""
        text = f"about {spoken_gb(self.memory.total)} per GPU"
        if self.host_bytes_per_gpu:
            text += f" and {spoken_gb(self.host_bytes_per_gpu)} of the host's memory for each"
        if self.hours is None:
            return text
        return f"{text}, {'at most ' if self.at_most else ''}{_spoken(self.hours)}"


def estimate(run: Run) -> Estimate:
    """Memory, hours, whether it fits, and what to change if not."""
    seconds = train_seconds(run)
    return Estimate(
        memory=gpu_memory(run),
        host_bytes_per_gpu=host_memory(run),
        hours=None if seconds is None else seconds / 3600,
        at_most=seconds is not None and run.data is None,
        fits=fits(run),
        advice=advise(run),
    )


class MethodFields(Protocol):
    """The `method` of a custom resource: exactly one member is set."""

    @property
    def full(self) -> Any: ...


def run_for_spec(
    *,
    dimensions: Dimensions,
    method: MethodFields,
    training: Training,
    stage: Stage,
    offload: Offload,
    launch: Launch,
    gpu: Gpu | None = None,
    data: Data | None = None,
) -> Run:
    """A custom resource's resolved fields as a run of our trainer."""
    name, adapter = _method(method)
    targets = (
        {} if adapter is None else {"lora_rank": adapter.r, "lora_targets": tuple(adapter.target_modules)}
    )
    return Run(
        shape=Shape.of(dimensions),
        method=name,
        stage=stage,
        offload=offload,
        length=training.max_length,
        micro_batch=training.micro_batch_size,
        accumulation=training.gradient_accumulation_steps,
        gpus_per_node=launch.processes_per_node,
        nodes=launch.nodes,
        gpu=gpu,
        checkpointing=training.gradient_checkpointing,
        checkpointing_every=training.gradient_checkpointing_every,
        value_bytes=2 if training.precision == "bf16" else 4,
        gradient_bytes=4 if training.fp32_gradients else None,
        max_steps=training.max_steps,
        data=data,
        **targets,
    )


def estimate_for_spec(
    *,
    size: str,
    method: MethodFields,
    training: Training,
    stage: Stage,
    launch: Launch,
    offload: Offload = "none",
    gpu: Gpu | None = None,
    data: Data | None = None,
    dimensions: Dimensions | None = None,
) -> Estimate | None:
    """The estimate for a custom resource, from what its plan has resolved.

    Args:
        size: `model.size`; with `custom`, `dimensions` says how large the model is.
        method: the spec's own.
        training: the spec's own.
        stage: the ZeRO stage, resolved.
        launch: pods and processes.
        offload: `deepspeed.offload`.
        gpu: see `gpus.find_gpu`; None when the nodes are not known yet.
        data: None until the data are prepared; there are no hours then, or with `training.maxSteps` those of
            full rows.
        dimensions: of a custom model, when its config.json has been read.

    Returns:
        None for a model of unknown size, and for training on CPU.
    """
    known = dimensions if size == "custom" else PRESETS[size]
    if known is None or launch.device == "cpu":
        return None
    run = run_for_spec(
        dimensions=known,
        method=method,
        training=training,
        stage=stage,
        offload=offload,
        launch=launch,
        gpu=gpu,
        data=data,
    )
    return estimate(run)


def _method(method: MethodFields) -> tuple[MethodName, Any]:
    names: tuple[MethodName, ...] = ("lora", "qlora")
    for name in names:
        adapter = getattr(method, name, None)
        if adapter is not None:
            return name, adapter
    return "full", None


def _spoken(hours: float) -> str:
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
