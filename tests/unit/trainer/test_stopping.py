"""A pod that is asked to end: the micro batch is finished, the optimizer step is not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.unit.trainer.test_data_packing import store_of
from yuan2_model.rows import Rows
from yuan2_trainer.pod.stopping import AskedToEndError, Vote
from yuan2_trainer.train.step import Stepper, Wishes


class Engine:
    """What a step needs of DeepSpeed's engine, around one weight."""

    def __init__(self) -> None:
        self.module: Any = torch.nn.Linear(1, 1)
        self.module.get_input_embeddings = lambda: self.module
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0)
        self.passes = 0
        self.steps = 0

    def __call__(self, rows: Rows, **_: Any) -> Any:
        self.passes += 1
        return SimpleNamespace(loss=self.module(torch.ones(1, 1)).sum() * rows.input_ids.shape[0])

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.steps += 1

    def was_step_applied(self) -> bool:
        return True

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stepper(engine: Engine, vote: Vote | None) -> Stepper:
    return Stepper(
        engine=engine,
        store=store_of([4] * 5),
        device=torch.device("cpu"),
        micro_batch_size=1,
        accumulation_steps=5,
        pad_id=0,
        max_length=8,
        max_grad_norm=1.0,
        packing=False,
        vote=vote,
    )


@pytest.mark.parametrize("asked_at", [1, 3])
def test_the_micro_batch_is_finished_and_the_step_is_not(asked_at: int) -> None:
    engine, calls = Engine(), count(1)
    vote = Vote(lambda: next(calls) == asked_at)
    with pytest.raises(AskedToEndError):
        stepper(engine, vote).run(np.arange(5), 0.1)
    assert engine.passes == asked_at
    assert engine.steps == 0


def test_a_step_that_nobody_interrupts_is_done() -> None:
    engine = Engine()
    result = stepper(engine, Vote(lambda: False)).run(np.arange(5), 0.1)
    assert (engine.passes, engine.steps, engine.boundary) == (5, 1, True)
    assert not result.stop


def test_after_the_last_micro_batch_the_step_is_done() -> None:
    engine, calls = Engine(), count(1)
    result = stepper(engine, Vote(lambda: next(calls) == 5)).run(np.arange(5), 0.1, lambda: Wishes(stop=True))
    assert engine.steps == 1
    assert result.stop
