"""Conversations to evaluate on: those of another file, or a share of the training data set aside.

What is set aside are whole conversations, never single sequences of one, and equal conversations stay
together, so that nothing is asked that was trained on. Which ones depends on their content and the seed
alone: not on their order, on the number of ranks or on how the data were prepared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from yuan2_core.contract import TrainJob
from yuan2_core.errors import DatasetError
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.order import Indices, mix
from yuan2_trainer.data.prepare import Prepared, prepare
from yuan2_trainer.data.rendering import Beat
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.pod.workspace import Workspace

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class HeldOut:
    """Samples of a store to evaluate on."""

    store: SampleStore
    indices: Indices


def set_aside(
    job: TrainJob,
    prepared: Prepared,
    tokenizer: Yuan2Tokenizer,
    workspace: Workspace,
    beat: Beat,
    cache: Path | None = None,
) -> Prepared:
    """Prepare what the job evaluates on, if it does, and leave it in the workspace.

    Args:
        job: says which data.
        prepared: the training data, in the workspace already.
        tokenizer: the model's.
        workspace: of this node.
        beat: as for `prepare`.
        cache: as for `prepare`.

    Returns:
        What is left to train on, and what there is to evaluate on.

    Raises:
        DatasetError: as `prepare`, of the evaluation's file; or nothing would be left to train on.
    """
    if job.dataset.eval_path is not None:
        location = job.dataset.model_copy(update={"path": job.dataset.eval_path, "files": ()})
        other = prepare(location, job.training, tokenizer, workspace.evaluation, beat, cache, job.objective)
        longest = max(prepared.longest, other.longest)
        found = {"eval_samples": other.samples, "eval_fingerprint": other.fingerprint, "longest": longest}
        return prepared.model_copy(update=found)
    if job.dataset.eval_fraction > 0:
        return _split(job, prepared, workspace)
    return prepared


def _split(job: TrainJob, prepared: Prepared, workspace: Workspace) -> Prepared:
    store = SampleStore.open(workspace.samples)
    chosen = choose(conversation_keys(store), job.dataset.eval_fraction, job.training.seed)
    if chosen is None:
        raise DatasetError(
            f"{job.dataset.path}: dataset.evalFraction {job.dataset.eval_fraction} leaves nothing to train "
            "on: all its conversations are the same; name other data as dataset.evalSource, or leave it out"
        )
    _, number = np.unique(store.conversations, return_inverse=True)
    of_sample = chosen[number.reshape(-1)]
    held, left = np.flatnonzero(of_sample), np.flatnonzero(~of_sample)
    np.save(workspace.held_out, held)
    np.save(workspace.training, left)
    return prepared.model_copy(
        update={"samples": len(left), "tokens": int(store.lengths[left].sum()), "eval_samples": len(held)}
    )


def choose(keys: Keys, fraction: float, seed: int) -> NDArray[np.bool_] | None:
    """Which conversations are held out: `fraction` of them, at least one, and one at least is left.

    Args:
        keys: `conversation_keys`; equal ones are not separated.
        fraction: in (0, 1).
        seed: another seed, other conversations.

    Returns:
        [C] True where held out; `None` where all conversations are equal.
    """
    drawn = mix(keys ^ mix(np.full(1, seed & (2**64 - 1), dtype=np.uint64)))
    _, place, counts = np.unique(drawn, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return None
    wanted = max(1, round(fraction * len(keys)))
    taken = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    chosen: NDArray[np.bool_] = place.reshape(-1) < min(taken, len(counts) - 1)
    return chosen


def conversation_keys(store: SampleStore) -> Keys:
    """64 bits of a hash of each conversation, in order: of its last sample, whose prompt is all that was said
    before its answer."""
    lasts = np.flatnonzero(np.diff(store.conversations, append=-1))
    return np.fromiter((_key(store, int(last)) for last in lasts), dtype=np.uint64, count=len(lasts))


def _key(store: SampleStore, sample: int) -> int:
    content = np.ascontiguousarray(store.tokens_of(sample)).data
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def training_samples(workspace: Workspace) -> Indices | None:
    """The samples that are left to train on; `None`: all of them."""
    path = workspace.training
    return np.load(path, mmap_mode="r") if path.exists() else None


def evaluation_samples(workspace: Workspace) -> HeldOut | None:
    """What there is to evaluate on, if anything."""
    if workspace.evaluation.exists():
        store = SampleStore.open(workspace.evaluation)
        return HeldOut(store, np.arange(len(store)))
    if workspace.held_out.exists():
        return HeldOut(SampleStore.open(workspace.samples), np.load(workspace.held_out))
    return None
