"""What the benchmarks of the trainer share: data, a model, DeepSpeed's engine in this one process, a stepper.

The small models have a vocabulary of `VOCABULARY`, and every token id is taken modulo that: with the
tokenizer's 135,040 rows the output layer, which has 15% of the FLOPs of Yuan2-2B, would have most of theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.ports import free_port
from tests.support.training import make_job
from yuan2_core.contract import DatasetLocation, TrainJob
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import Yuan2Config, Yuan2ForCausalLM, random_model
from yuan2_trainer.data.order import epoch_order
from yuan2_trainer.data.prepare import prepare
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.model.deepspeed import build_engine, prepare_environment
from yuan2_trainer.train.step import Stepper, StepResult

VOCABULARY = 4096
RATE = 1e-5
now = {"wall": time.perf_counter, "cpu": time.process_time}[os.environ.get("YUAN2_BENCH_CLOCK", "wall")]
"""The clock of all measurements. `cpu` counts what this process computed, whatever else the machine does:
with one thread it is what the wall clock says on an idle machine."""


def start(threads: int) -> None:
    """A process group of this process alone, and so many threads for torch."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(threads)
    prepare_environment("cpu")
    from yuan2_trainer.rank import start_process_group

    start_process_group("cpu", tf32=False)


@dataclass(frozen=True)
class Sizes:
    """Of a model; its heads have 64 channels and its MLP four times the hidden size."""

    hidden: int
    layers: int

    def __str__(self) -> str:
        return f"hidden {self.hidden:,} × {self.layers} layers"


def model_of(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Yuan2ForCausalLM:
    """A Yuan 2.0 of these sizes in training mode, to be given any token ids."""
    config = Yuan2Config(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        eod_token=77185 % VOCABULARY,
        sep_token=77187 % VOCABULARY,
        use_cache=False,
    )
    model = random_model(config, seed=0, dtype=dtype).train()
    model.register_forward_pre_hook(_fold, with_kwargs=True)
    return model


def _fold(_: object, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Token ids modulo the vocabulary; labels too, where there are any."""
    rows = named.get("rows")
    if rows is not None:
        folded = replace(rows, input_ids=rows.input_ids % VOCABULARY, next_1L=rows.next_1L % VOCABULARY)
        return positional, {**named, "rows": folded}
    ids, labels = named["input_ids"], named["labels"]
    labels = torch.where(labels < 0, labels, labels % VOCABULARY)
    return positional, {**named, "input_ids": ids % VOCABULARY, "labels": labels}


def compute_again(model: Yuan2ForCausalLM, wanted: bool) -> None:
    """Switch gradient checkpointing as the trainer has it at ZeRO-2: every layer is computed again."""
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class Data:
    """Prepared samples, and the seconds that took."""

    store: SampleStore
    pad_id: int
    seconds: float


def prepared(records: Path, model: Path, target: Path, max_length: int, **training: Any) -> Data:
    """The trainer's own preparation of a file of records."""
    settings = Training(max_length=max_length, **training)
    location = DatasetLocation(path=str(records))
    tokenizer = Yuan2Tokenizer.from_pretrained(model)
    began = now()
    found = prepare(location, settings, tokenizer, target, lambda: None)
    return Data(SampleStore.open(target), found.pad_id, now() - began)


def stepper_of(
    model: Yuan2ForCausalLM, data: Data, root: Path, max_length: int, precision: str = "fp32"
) -> Stepper:
    """The trainer's stepper with ZeRO-2, AdamW and clipping, as the published recipe of 2B has them;
    gradient checkpointing is off until `compute_again` switches it on."""
    job = job_of(root, max_length, precision)
    engine = build_engine(model, job)
    return Stepper(
        engine=engine,
        store=data.store,
        device=engine.device,
        micro_batch_size=job.training.micro_batch_size,
        accumulation_steps=job.training.gradient_accumulation_steps,
        pad_id=data.pad_id,
        max_length=max_length,
        max_grad_norm=job.training.max_grad_norm,
        packing=True,
    )


def job_of(root: Path, max_length: int, precision: str) -> TrainJob:
    """A job of which only hyperparameters count here."""
    shape = {"micro_batch_size": 4, "gradient_accumulation_steps": 4, "max_length": max_length}
    return make_job(root, root, root, stage=2, precision=precision, **shape)


class Epoch:
    """Batches of an epoch's order (or another one), one after the other, again and again."""

    def __init__(self, stepper: Stepper, size: int, order: np.ndarray | None = None) -> None:
        self.stepper = stepper
        self.size = size
        self.order = epoch_order(stepper.store.conversations, 42, 0) if order is None else order
        self._next = 0

    def batch(self) -> np.ndarray:
        """The samples of the next batch."""
        if self._next + self.size > len(self.order):
            self._next = 0
        self._next += self.size
        return self.order[self._next - self.size : self._next]

    def step(self) -> StepResult:
        """One optimizer step over the next batch."""
        return self.over(self.batch())

    def over(self, batch: np.ndarray) -> StepResult:
        """One optimizer step over these samples."""
        return self.stepper.run(batch, RATE)


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call, by `now`."""
    began = now()
    run()
    return now() - began
