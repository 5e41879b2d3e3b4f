"""What full, LoRA and QLoRA mean in numbers and in refusals. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from yuan2_core.conflicts import adapter_of, method_conflicts
from yuan2_core.contract import TrainJob
from yuan2_core.sections import LoRA, Method, TargetModule
from yuan2_model.dimensions import Dimensions
from yuan2_trainer.pod.outcome import JobError

BITSANDBYTES_FOR_GPU = (0, 43)
BITSANDBYTES_FOR_CPU = (0, 46)
"""First releases with nf4 for CUDA 12.2, and for a processor (bitsandbytes' release notes)."""
BLOCK = 64
"""4-bit weights that share a scale: bitsandbytes' default, and QLoRA's (arXiv 2305.14314)."""


def check_method(job: TrainJob) -> None:
    """Refuse combinations that cannot work, and what the image lacks.

    Raises:
        JobError: names the field and the way out.
    """
    refuse(method_conflicts(job))
    if job.method.qlora is not None:
        needed = BITSANDBYTES_FOR_GPU if job.launch.device == "cuda" else BITSANDBYTES_FOR_CPU
        problem = missing_package("bitsandbytes", needed)
        if problem is not None:
            raise JobError(
                f"method.qlora needs {problem}; use an image with a newer BASE_IMAGE, or method.lora"
            )


def check_rows(job: TrainJob, dimensions: Dimensions) -> None:
    """Refuse 4 bits for a model whose rows of weights do not hold whole blocks, on a CPU.

    There bitsandbytes counts blocks by row where the processor has AVX-512 and through the whole matrix where
    it has not: any other row gets the scales of other blocks (ADR 10).

    Raises:
        JobError: names the field and the way out.
    """
    if job.method.qlora is None or job.launch.device == "cuda":
        return
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(dimensions, name)
        if size % BLOCK:
            raise JobError(
                f"method.qlora: the model's {name} is {size}, and on CPUs bitsandbytes needs a multiple of "
                f"{BLOCK} to read 4-bit weights rightly; use method.lora, or GPUs"
            )


def refuse(conflicts: Iterable[str]) -> None:
    """Raise the first of them as a JobError."""
    for text in conflicts:
        raise JobError(text)


def missing_package(name: str, at_least: tuple[int, int]) -> str | None:
    """What is wrong with an installed package, `None` if nothing is."""
    wanted = f"{name} {at_least[0]}.{at_least[1]} or newer"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{wanted}, which this image does not have"
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= at_least else f"{wanted}, this image has {version}"


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
