"""What a finished run exports: `<output>/model` in the published layout, `<output>/adapter` in PEFT's.

The model is written tensor by tensor: no process ever holds more of it, beside its own share, than one tensor
or, where an adapter is merged, one layer's. Files that an interrupted export has completed are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from yuan2_core.conflicts import adapter_of
from yuan2_core.contract import TrainJob
from yuan2_core.durable import sync
from yuan2_core.sections import LoRA
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model.adapters import ADAPTER_CONFIG
from yuan2_model.writing import DEFAULT_SHARD_SIZE, ModelPlan, ShardWriter, describe, plan_model
from yuan2_trainer.model.adapters import is_adapter, save_adapter, save_base_config
from yuan2_trainer.model.published import PublishedWeights
from yuan2_trainer.model.spreading import gathering
from yuan2_trainer.pod.lease import require_lease

MODEL_DIRECTORY = "model"
ADAPTER_DIRECTORY = "adapter"
_MARKS = {MODEL_DIRECTORY: "config.json", ADAPTER_DIRECTORY: ADAPTER_CONFIG}
"""A file that each directory has once it is complete."""
_WEIGHTS_OF = ".weights-of"
"""In a directory that is being written: which weights its files hold."""

Beat = Callable[[], object]


@dataclass(frozen=True)
class Export:
    """Writes what was trained. All ranks take part, rank 0 writes; a reader sees the old directory or the new
    one."""

    job: TrainJob
    engine: Any
    weights_of: str | None
    """Names the weights, equal in two attempts only if they are; `None`: nothing is gone on with."""
    beat: Beat = lambda: None
    """Called by all ranks before each tensor; raises to end the export."""
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def write(self) -> str:
        """The model, or the adapter and, where asked for, base and adapter merged; returns words on where it
        is."""
        adapter = adapter_of(self.job.method)
        if adapter is not None:
            self._write_adapter(adapter)
        if adapter is None or self.job.merge_adapter:
            self._write_model(adapter)
        places = (str(Path(self.job.output) / name) for name in export_directories(self.job))
        return f"written to {' and '.join(places)}"

    def _write_adapter(self, adapter: LoRA) -> None:
        state = self._gather(is_adapter)
        if dist.get_rank() == 0:
            require_lease(self.job)
            partial = self._beside(ADAPTER_DIRECTORY)
            shutil.rmtree(partial, ignore_errors=True)
            save_adapter(state, adapter, self.job.model.path, partial)
            save_base_config(Path(self.job.model.path), partial)
            self._complete(partial, ADAPTER_DIRECTORY)
        dist.barrier()

    def _write_model(self, adapter: LoRA | None) -> None:
        weights = PublishedWeights(self.engine.module, adapter)
        config = self.engine.module.config
        plan = plan_model(config, lambda _: weights.dtype, self.max_shard_size)
        partial = self._beside(MODEL_DIRECTORY)
        for shard in self._missing(plan, partial):
            writer = ShardWriter(partial, shard, plan.of(shard)) if dist.get_rank() == 0 else nullcontext()
            with writer as open_writer:
                for name in plan.of(shard):
                    self.beat()
                    tensor = weights.read(name)
                    if open_writer is not None and tensor is not None:
                        open_writer.add(name, tensor)
        if dist.get_rank() == 0:
            describe(plan, config, partial)
            (partial / _WEIGHTS_OF).unlink()
            self._complete(partial, MODEL_DIRECTORY)
        dist.barrier()

    def _missing(self, plan: ModelPlan, partial: Path) -> list[str]:
        """The files that are still to be written, as rank 0 sees it."""
        told: list[list[str]] = [[]]
        if dist.get_rank() == 0:
            require_lease(self.job)
            _keep_only(partial, self.weights_of)
            told[0] = [shard for shard in plan.shards if not plan.has(partial, shard)]
        dist.broadcast_object_list(told)
        return told[0]

    def _gather(self, only: Callable[[str], bool]) -> dict[str, Tensor]:
        """Weights on the CPU of rank 0; empty on the other ranks."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            if only(name):
                self.beat()
                with gathering(parameter, None):
                    if dist.get_rank() == 0:
                        state[name] = parameter.detach().to("cpu", copy=True)
        return state

    def _beside(self, name: str) -> Path:
        return Path(self.job.output) / f".{name}.partial"

    def _complete(self, partial: Path, name: str) -> None:
        Yuan2Tokenizer.from_pretrained(self.job.model.path).save_pretrained(partial)
        require_lease(self.job)
        put_in_place(partial, Path(self.job.output) / name)


def export_directories(job: TrainJob) -> list[str]:
    """What a complete run has left in its output."""
    if job.method.full is not None:
        return [MODEL_DIRECTORY]
    return [ADAPTER_DIRECTORY, MODEL_DIRECTORY] if job.merge_adapter else [ADAPTER_DIRECTORY]


def is_exported(job: TrainJob) -> bool:
    """Whether all of it is there."""
    return all((Path(job.output) / name / _MARKS[name]).is_file() for name in export_directories(job))


def put_in_place(partial: Path, final: Path) -> None:
    """Replace a directory by another one beside it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _keep_only(partial: Path, weights_of: str | None) -> None:
    """A directory to write in, with files of these very weights or none."""
    mark = partial / _WEIGHTS_OF
    if weights_of is None or not mark.is_file() or mark.read_text() != weights_of:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        mark.write_text(weights_of or "")
        sync(mark)
