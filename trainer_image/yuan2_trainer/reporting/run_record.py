"""`<output>/job.json`: what ran, on what, with what; `python -m yuan2_trainer --job` runs it again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from yuan2_core.contract import TrainJob
from yuan2_trainer.checkpoint.export import is_exported
from yuan2_trainer.data.prepare import Prepared
from yuan2_trainer.pod.lease import require_lease
from yuan2_trainer.pod.workspace import read_text, replace

JOB_RECORD = "job.json"
IMAGE_VERSION = "YUAN2_VERSION"
"""Environment variable that an image was built with: version or commit of this project."""
_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "numpy",
    "safetensors",
    "sentencepiece",
)


def make_record(job: TrainJob, identity: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    """Everything about a run that does not change while it runs."""
    return {
        "job": json.loads(job.to_json()),
        "identity": identity,
        "data": {"path": job.dataset.path, **prepared.model_dump(exclude={"pad_id"})},
        "model": {"path": job.model.path, "files": _sizes(Path(job.model.path))},
        "hardware": _hardware(job),
        "versions": _versions(os.environ),
    }


def write_record(
    job: TrainJob, record: dict[str, Any], step: int, complete: bool, exported_step: int | None = None
) -> None:
    """Leave the record in the output, with how far the run came and whose step's weights it left."""
    ending = {"step": step, "complete": complete}
    if exported_step is not None:
        ending["exportedStep"] = exported_step
    text = json.dumps({**record, **ending}, ensure_ascii=False, indent=2)
    require_lease(job)
    replace(Path(job.output) / JOB_RECORD, text + "\n")


def completed_step(job: TrainJob, is_this_run: Callable[[dict[str, Any]], bool]) -> int | None:
    """The last step of this very run when it is complete and what it exports is there, else `None`.

    Args:
        job: names the output.
        is_this_run: whether an identity is that of this run.
    """
    text = read_text(Path(job.output) / JOB_RECORD)
    if text is None or not is_exported(job):
        return None
    try:
        record = json.loads(text)
        done = record["complete"] is True and is_this_run(record["identity"])
        return int(record["step"]) if done else None
    except (ValueError, KeyError, TypeError):
        return None


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file of the model directory: reading a hundred gigabytes for checksums takes too long."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in files}


def _hardware(job: TrainJob) -> dict[str, Any]:
    found: dict[str, Any] = {"processes": dist.get_world_size(), "machine": platform.machine()}
    if job.launch.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _versions(environment: Mapping[str, str]) -> dict[str, str]:
    """Of what decides the numbers; a package that this image does without is absent."""
    found = {"python": platform.python_version()}
    found.update({name: version for name in _PACKAGES if (version := _version(name)) is not None})
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if environment.get(IMAGE_VERSION):
        found["yuan2"] = environment[IMAGE_VERSION]
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
