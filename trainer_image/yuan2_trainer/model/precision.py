"""The types that a job's parameters have, and the check that loading, DeepSpeed and PEFT gave them those.

What a library decides by the processor it finds, it can decide against the job without a word (ADR 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

import torch
from torch import Tensor, nn

from yuan2_core.contract import TrainJob
from yuan2_trainer.model.quantised import STORAGE_TYPE, is_quantised
from yuan2_trainer.pod.outcome import JobError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def require_precision(job: TrainJob) -> None:
    """Ask DeepSpeed whether it can train in the job's precision here.

    Raises:
        JobError: it cannot; its own error, much later, would be taken for a crash and tried again.
    """
    from deepspeed.accelerator import get_accelerator

    if job.training.precision == "bf16" and not get_accelerator().is_bf16_supported():
        other = "use GPUs that can" if job.method.qlora else "set it to fp32, or use GPUs that can"
        raise JobError(f"training.precision: this {job.launch.device} device cannot compute in bf16; {other}")


def check_model(model: nn.Module, job: TrainJob) -> None:
    """Compare the type of every parameter, and of its piece under ZeRO-3, with what the job asks for.

    Raises:
        JobError: names the field, a parameter that differs and the way out.
    """
    whole = DTYPES[job.training.precision]
    four_bits = job.method.qlora is not None
    _compare(
        (
            (name, found, STORAGE_TYPE if four_bits and is_quantised(name) else whole)
            for name, found in _types(model)
        ),
        job,
    )


def check_state(state: Mapping[str, Tensor], job: TrainJob) -> None:
    """Compare the type of every tensor that is exported with the job's precision.

    Raises:
        JobError: as `check_model`.
    """
    wanted = DTYPES[job.training.precision]
    _compare(((name, tensor.dtype, wanted) for name, tensor in state.items()), job)


def _types(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.dtype
        # What a rank keeps under ZeRO-3; an override of `zero_optimization` may hold frozen pieces in int8.
        piece = getattr(parameter, "ds_tensor", None)
        if piece is not None and piece.is_floating_point():
            yield name, piece.dtype


def _compare(types: Iterable[tuple[str, torch.dtype, torch.dtype]], job: TrainJob) -> None:
    """Refuse (parameter, type found, type asked for) that differ."""
    wrong = {name: (found, wanted) for name, found, wanted in types if found != wanted}
    if not wrong:
        return
    name, (found, wanted) = next(iter(wrong.items()))
    others = f" and {len(wrong) - 1} others are wrong too" if len(wrong) > 1 else ""
    if job.method.qlora is None:
        field, package = "training.precision", "deepspeed"
        way_out = f"set deepspeed.stage to another stage than {job.stage}"
    else:
        field, package, way_out = "method.qlora", "bitsandbytes", "use method.lora"
    raise JobError(
        f"{field}: {name} is {_short(found)} instead of {_short(wanted)}{others}; {way_out}, or use an image "
        f"with another {package} than {metadata.version(package)}"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
