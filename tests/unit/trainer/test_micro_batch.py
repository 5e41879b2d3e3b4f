"""A micro batch makes no host wait for a GPU, and computes what the model computes of the same arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.training import make_job, write_data, write_model
from yuan2_model import Yuan2ForCausalLM, load_model
from yuan2_trainer.data.collate import collate
from yuan2_trainer.data.packing import cut_batch
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.train import step as step_module
from yuan2_trainer.train.step import Stepper

WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::_unique2",
}
"""Operations whose result's value or size the host must know (torch's `set_sync_debug_mode` would tell on a
GPU)."""


class Watch(TorchDispatchMode):
    """Notes operations that would wait, while it is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        masks = args[1] if name == "aten::index" else ()
        if name in WAITING or any(item is not None and item.dtype == torch.bool for item in masks):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    root = tmp_path_factory.mktemp("data")
    workspace = Workspace(root)
    check_job(make_job(directory, write_data(root / "data.json", 25), root / "out"), workspace, lambda: None)
    return SampleStore.open(workspace.samples)


def stepper(model: Yuan2ForCausalLM, store: SampleStore, packing: bool) -> Stepper:
    engine = SimpleNamespace(module=model)
    pad_id = model.config.pad_token_id
    return Stepper(engine, store, torch.device("cpu"), 4, 1, pad_id, 128, 1.0, packing)


@contextmanager
def watched_computation(watch: Watch) -> Iterator[None]:
    """Between the collator's work, which is the host's, and the end of the backward pass."""
    real = step_module.prepare_rows

    def prepared(*arguments: Any, **options: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return real(*arguments, **options)

    step_module.prepare_rows = prepared  # type: ignore[assignment]
    try:
        with watch:
            yield
    finally:
        step_module.prepare_rows = real  # type: ignore[assignment]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_host_waits(directory: Path, store: SampleStore, packing: bool, checkpointing: bool) -> None:
    model = load_model(directory, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stepping = stepper(model, store, packing)
    watch = Watch()
    rows = cut_batch(np.arange(12), store, 4, 128, 1, packing=packing)[0]
    with watched_computation(watch):
        stepping.losses(rows, "sum", model).backward()
    assert watch.found == set()
    with watch:  # the watch sees what would wait
        model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long))
    assert watch.found


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_what_their_arrays_say(directory: Path, store: SampleStore, packing: bool) -> None:
    model = load_model(directory, dtype=torch.float32).train()
    stepping = stepper(model, store, packing)
    for rows in cut_batch(np.arange(len(store.lengths)), store, 4, 128, 1, packing=packing):
        micro = collate(store, rows, stepping.pad_id, 128)
        arrays = {name: value for name, value in vars(micro).items() if value is not None}
        plain = model(
            **{name: torch.from_numpy(value) for name, value in arrays.items()},
            use_cache=False,
            return_logits=False,
            loss_reduction="sum",
        ).loss
        found = stepping.losses(rows, "sum", model)
        assert found.item() == plain.item()
        parameters = list(model.parameters())
        for one, other in zip(
            torch.autograd.grad(found, parameters), torch.autograd.grad(plain, parameters), strict=True
        ):
            assert torch.equal(one, other)
