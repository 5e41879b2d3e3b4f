"""What full, LoRA and QLoRA mean in numbers and in refusals. Pure, no torch."""

from __future__ import annotations

from importlib import metadata

from yuan2_core.contract import LoRA, Method, TargetModule, Training, TrainJob
from yuan2_model.dimensions import Dimensions
from yuan2_trainer.outcome import JobError

BITSANDBYTES_FOR_GPU = (0, 43)
BITSANDBYTES_FOR_CPU = (0, 46)
"""First releases with nf4 for CUDA 12.2, and for a processor (bitsandbytes' release notes)."""


def adapter_of(method: Method) -> LoRA | None:
    """The adapter that a method trains, `None` when it trains all parameters."""
    return method.lora or method.qlora


def check_method(job: TrainJob) -> None:
    """Refuse combinations that cannot work.

    Raises:
        JobError: names the field and the way out.
    """
    method = job.method
    if [method.full, method.lora, method.qlora].count(None) != 2:
        raise JobError("method: set exactly one of full, lora and qlora")
    if job.merge_adapter and method.full is not None:
        raise JobError("mergeAdapter: method.full trains no adapter; leave mergeAdapter out")
    if method.qlora is not None:
        _check_qlora(job)
    adapter = adapter_of(method)
    if adapter is not None and adapter.dora and job.stage == 3:
        raise JobError(
            "method: dora needs the norms of whole weights, which ZeRO-3 has cut into pieces; "
            "set deepspeed.stage to 2, or dora to false"
        )


def _check_qlora(job: TrainJob) -> None:
    if job.stage == 3:
        raise JobError(
            "method.qlora: ZeRO-3 cannot cut 4-bit weights into pieces; set deepspeed.stage to 2 (the "
            "weights are a quarter of their size already), or use method.lora"
        )
    if job.training.precision != "bf16":
        raise JobError("method.qlora computes in bf16; set training.precision to bf16")
    needed = BITSANDBYTES_FOR_GPU if job.launch.device == "cuda" else BITSANDBYTES_FOR_CPU
    problem = missing_package("bitsandbytes", needed)
    if problem is not None:
        raise JobError(f"method.qlora needs {problem}; use an image with a newer BASE_IMAGE, or method.lora")


def missing_package(name: str, at_least: tuple[int, int]) -> str | None:
    """What is wrong with an installed package, `None` if nothing is."""
    wanted = f"{name} {at_least[0]}.{at_least[1]} or newer"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{wanted}, which this image does not have"
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= at_least else f"{wanted}, this image has {version}"


def check_schedule(training: Training) -> None:
    """Refuse two lengths of one warm-up. Raises JobError."""
    if training.warmup_ratio is not None and training.warmup_steps is not None:
        raise JobError("training: warmupRatio and warmupSteps exclude each other; leave one out")


def trainable_parameters(method: Method, dimensions: Dimensions) -> int:
    """Numbers that an optimizer step changes."""
    adapter = adapter_of(method)
    if adapter is None:
        return dimensions.parameters
    layers = dimensions.num_hidden_layers
    return layers * sum(_matrix(adapter, name, dimensions) for name in set(adapter.target_modules))


def _matrix(adapter: LoRA, name: TargetModule, dimensions: Dimensions) -> int:
    hidden, inner = dimensions.hidden_size, dimensions.intermediate_size
    outputs = inner if name in ("gate_proj", "up_proj") else hidden
    inputs = inner if name == "down_proj" else hidden
    return adapter.r * (inputs + outputs) + (outputs if adapter.dora else 0)
