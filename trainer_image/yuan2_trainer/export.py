"""What a finished run leaves behind: `<output>/model` in the published layout, and `<output>/job.json`."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from yuan2_core.contract import TrainJob
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import save_model
from yuan2_trainer.checkpoint import sync_directory
from yuan2_trainer.workspace import read_text, replace

MODEL_DIRECTORY = "model"
JOB_RECORD = "job.json"
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors", "sentencepiece")


def export_model(engine: Any, job: TrainJob) -> Path:
    """Write the trained model; all ranks take part, rank 0 writes. A reader sees the old model or the new
    one."""
    state = gather_weights(engine)
    final = Path(job.output) / MODEL_DIRECTORY
    if dist.get_rank() == 0:
        partial = final.with_name(f".{MODEL_DIRECTORY}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_model(state, engine.module.config, partial)
            Yuan2Tokenizer.from_pretrained(job.model.path).save_pretrained(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        put_in_place(partial, final)
    dist.barrier()
    return final


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, in training precision; empty on the other ranks."""
    keep = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with _gathered(parameter):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def put_in_place(partial: Path, final: Path) -> None:
    """Replace a directory by another one beside it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_record(job: TrainJob, identity: dict[str, Any], step: int, complete: bool) -> None:
    """`job.json`: the job as run, the versions it ran with, and how far it came."""
    record = {
        "job": json.loads(job.to_json()),
        "identity": identity,
        "step": step,
        "complete": complete,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    }
    replace(Path(job.output) / JOB_RECORD, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def completed_step(job: TrainJob, identity: dict[str, Any]) -> int | None:
    """The last step of this very run when it is complete and its model is there, else `None`."""
    text = read_text(Path(job.output) / JOB_RECORD)
    if text is None or not (Path(job.output) / MODEL_DIRECTORY / "config.json").is_file():
        return None
    try:
        record = json.loads(text)
        done = record["complete"] is True and record["identity"] == identity
        return int(record["step"]) if done else None
    except (ValueError, KeyError, TypeError):
        return None


def _gathered(parameter: Any) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
