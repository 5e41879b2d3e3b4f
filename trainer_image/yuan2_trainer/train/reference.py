"""The reference of DPO and KTO: log-probabilities by the model that training starts from, computed once.

They are computed before the first step, when the weights are still the base's, and an adapter is switched
off. Blocks of them are kept in the output: an attempt that was interrupted goes on with
the next block, and later attempts, whose weights have moved, read them all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from yuan2_core.conflicts import adapter_of
from yuan2_core.contract import TrainJob
from yuan2_core.sections import ORPO
from yuan2_model.adapters import adapted_layers
from yuan2_trainer.evaluation.judging import preempted_before
from yuan2_trainer.evaluation.measuring import Pulse
from yuan2_trainer.pod.lease import require_lease
from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.pod.stopping import AskedToEndError, Vote
from yuan2_trainer.train.loop import Loop
from yuan2_trainer.train.preferences import PreferenceStepper

REFERENCE: Final = "reference"
BLOCK: Final = 512
"""Samples whose log-probabilities are written together."""


def refer(job: TrainJob, loop: Loop, identity: Mapping[str, Any], step: int) -> None:
    """Give the stepper of training, and that of evaluation, their reference; nothing for other objectives.

    Args:
        job: what is trained.
        loop: ready to run.
        identity: of the run.
        step: optimizer steps done already.

    Raises:
        PreemptedError: the pod was asked to end; the blocks that are complete are kept.
        JobError: the weights have moved, and what was kept is gone.
    """
    steppers = [loop.stepper] + ([loop.judge.evaluator.own_stepper] if loop.judge is not None else [])
    pulse = Pulse(loop.stepper.vote or Vote(loop.workspace.stop.exists), loop.tracker)
    known: dict[str, NDArray[np.float32]] = {}
    if loop.tracker is not None:
        loop.tracker.update(state="evaluating")
    for stepper in steppers:
        if not isinstance(stepper, PreferenceStepper) or isinstance(stepper.settings, ORPO):
            continue
        name = _name(identity, stepper)
        if name not in known:
            try:
                known[name] = _values(job, stepper, Path(job.output) / REFERENCE / name, step, pulse)
            except AskedToEndError as error:
                raise preempted_before(step) from error
        stepper.reference.values = known[name]
    if loop.tracker is not None:
        loop.tracker.update(state="training")


def _name(identity: Mapping[str, Any], stepper: PreferenceStepper) -> str:
    """Of the run and the samples: nothing else may read these numbers."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    for array in (stepper.store.tokens, stepper.store.lengths):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _values(
    job: TrainJob, stepper: PreferenceStepper, directory: Path, step: int, pulse: Pulse
) -> NDArray[np.float32]:
    """Log-probabilities of all samples of a store; all ranks together."""
    found = []
    for first in range(0, len(stepper.store), BLOCK):
        samples = np.arange(first, min(first + BLOCK, len(stepper.store)))
        path = directory / f"{first:012}.npy"
        block = _kept(path, len(samples), stepper.device)
        if block is None:
            if step > 0 and adapter_of(job.method) is None:
                raise JobError(
                    f"objective: {directory}, the reference's log-probabilities, are gone, and the weights "
                    "have moved since; delete the checkpoints of this output to begin anew"
                )
            pulse.beat()
            with _without_adapter(stepper.engine.module):
                block = stepper.log_probabilities(samples)
            if dist.get_rank() == 0:
                _keep(job, path, block)
        found.append(block.cpu().numpy())
    return np.concatenate(found)


def _kept(path: Path, count: int, device: torch.device) -> Tensor | None:
    """A block that an earlier attempt has written, as rank 0 reads it; None where there is none."""
    told = torch.zeros(count + 1, device=device)
    if dist.get_rank() == 0 and path.is_file():
        told[0] = 1.0
        told[1:] = torch.from_numpy(np.load(path)).to(device)
    dist.broadcast(told, 0)
    return told[1:] if told[0] else None


def _keep(job: TrainJob, path: Path, block: Tensor) -> None:
    require_lease(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, block.cpu().numpy())
    beside = path.with_suffix(".new")
    beside.write_bytes(content.getvalue())
    beside.replace(path)


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
