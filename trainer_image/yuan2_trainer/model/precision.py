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
        JobError: names the precision, a parameter that differs and the way out.
    """
    whole = DTYPES[job.training.precision]
    four_bits = job.method.qlora is not None
    wrong = [
        f"{name} is {_short(found)}"
        for name, found in _types(model)
        if found != (STORAGE_TYPE if four_bits and is_quantised(name) else whole)
    ]
    _refuse(wrong, job)


def check_state(state: Mapping[str, Tensor], job: TrainJob) -> None:
    """Compare the type of every tensor that is exported with the job's precision.

    Raises:
        JobError: as `check_model`.
    """
    wanted = DTYPES[job.training.precision]
    _refuse(
        [f"{name} is {_short(tensor.dtype)}" for name, tensor in state.items() if tensor.dtype != wanted], job
    )


def _types(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.dtype
        # What a rank keeps under ZeRO-3; an override of `zero_optimization` may hold frozen pieces in int8.
        piece = getattr(parameter, "ds_tensor", None)
        if piece is not None and piece.is_floating_point():
            yield name, piece.dtype


def _refuse(wrong: Iterable[str], job: TrainJob) -> None:
    found = list(dict.fromkeys(wrong))
    if found:
        others = f" and {len(found) - 1} others are not either" if len(found) > 1 else ""
        raise JobError(
            f"training.precision: {job.training.precision} was asked for, but {found[0]}{others}; set "
            f"deepspeed.stage to another stage than {job.stage}, or use an image with another DeepSpeed than "
            f"{metadata.version('deepspeed')}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
