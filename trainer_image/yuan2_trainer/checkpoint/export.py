"""What a finished run exports: `<output>/model` in the published layout, `<output>/adapter` in PEFT's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from yuan2_core.conflicts import adapter_of
from yuan2_core.contract import LoRA, TrainJob
from yuan2_core.durable import sync
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import save_model
from yuan2_model.adapters import ADAPTER_CONFIG
from yuan2_trainer.model.adapters import is_adapter, merged_weights, save_adapter
from yuan2_trainer.model.partitioned import gathered
from yuan2_trainer.model.precision import check_state
from yuan2_trainer.model.quantised import dequantised

MODEL_DIRECTORY = "model"
ADAPTER_DIRECTORY = "adapter"
_MARKS = {MODEL_DIRECTORY: "config.json", ADAPTER_DIRECTORY: ADAPTER_CONFIG}
"""A file that each directory has once it is complete."""


def export_model(engine: Any, job: TrainJob) -> str:
    """Write what was trained: the model, or the adapter and, where asked for, base and adapter merged.

    All ranks take part, rank 0 writes. A reader sees the old directory or the new one. Returns words on where
    it is.

    Raises:
        JobError: a tensor is not in the job's precision.
    """
    adapter = adapter_of(job.method)
    if adapter is None:
        _write_model(job, gather_weights(engine), engine)
    else:
        _write_adapter(job, adapter, gather_weights(engine, only=is_adapter))
        if job.merge_adapter:
            state = gather_weights(engine)
            _write_model(job, merged_weights(state, engine.module.config, adapter) if state else {}, engine)
    return f"written to {' and '.join(str(Path(job.output) / name) for name in export_directories(job))}"


def export_directories(job: TrainJob) -> list[str]:
    """What a complete run has left in its output."""
    if job.method.full is not None:
        return [MODEL_DIRECTORY]
    return [ADAPTER_DIRECTORY, MODEL_DIRECTORY] if job.merge_adapter else [ADAPTER_DIRECTORY]


def is_exported(job: TrainJob) -> bool:
    """Whether all of it is there."""
    return all((Path(job.output) / name / _MARKS[name]).is_file() for name in export_directories(job))


def _write_model(job: TrainJob, state: dict[str, Tensor], engine: Any) -> None:
    check_state(state, job)

    def write(directory: Path) -> None:
        save_model(state, engine.module.config, directory)

    _replace_directory(job, MODEL_DIRECTORY, write)


def _write_adapter(job: TrainJob, adapter: LoRA, state: dict[str, Tensor]) -> None:
    check_state(state, job)

    def write(directory: Path) -> None:
        save_adapter(state, adapter, job.model.path, directory)
        shutil.copyfile(Path(job.model.path) / "config.json", directory / "config.json")

    _replace_directory(job, ADAPTER_DIRECTORY, write)


def _replace_directory(job: TrainJob, name: str, write: Callable[[Path], None]) -> None:
    """Write a directory, tokenizer included, beside the one that it then replaces."""
    if dist.get_rank() == 0:
        partial = Path(job.output) / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write(partial)
            Yuan2Tokenizer.from_pretrained(job.model.path).save_pretrained(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        put_in_place(partial, Path(job.output) / name)
    dist.barrier()


def gather_weights(engine: Any, only: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """Weights on the CPU of rank 0, in training precision, 4-bit ones as what they stand for; empty on the
    other ranks.

    Args:
        engine: DeepSpeed's engine.
        only: which parameters, by name.
    """
    keep = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not only(name):
            continue
        with gathered(parameter):
            if keep:
                state[name] = dequantised(parameter).to("cpu", copy=True)
    return state


def put_in_place(partial: Path, final: Path) -> None:
    """Replace a directory by another one beside it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
