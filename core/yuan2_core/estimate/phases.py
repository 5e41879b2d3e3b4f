"""A run from its first byte to its last: what each phase holds, reads, writes and waits for.

`gpu_memory` and `train_seconds` know the steps; here are the phases around them. `docs/large-models.md` walks
one run of 102B with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from yuan2_core.estimate.duration import micro_batch_seconds, ring_bandwidth, step_seconds
from yuan2_core.estimate.memory import (
    CUDA_CONTEXT,
    NCCL_BUFFERS,
    OPTIMIZER_BYTES,
    gpu_memory,
    host_memory,
    weight_bytes,
)
from yuan2_core.estimate.run import Run

MERGED_IN: Final = 4
"""Bytes of each number while an adapter is merged: the sum is made in fp32."""


@dataclass(frozen=True)
class Storage:
    """Where model and output lie.

    Attributes:
        name: as people say it.
        read, write: bytes a second that one process gets.
    """

    name: str
    read: float
    write: float


@dataclass(frozen=True)
class Phase:
    """Bytes and seconds of one phase.

    Attributes:
        name: `load`, `step`, `checkpoint` or `export`.
        gpu: bytes that a GPU holds at most, without what the allocator keeps in reserve.
        host: bytes of private memory that all processes of a node take at most for model, optimizer and
            tensors on their way; pages of files that were read come on top and go when they are in the way.
        read, written: bytes of all ranks from and to storage.
        sent: bytes that a rank sends to others.
        seconds: None when the GPU is not known.
    """

    name: str
    gpu: float
    host: float
    read: float
    written: float
    sent: float
    seconds: float | None


def phases(run: Run, storage: Storage, merge: bool = False) -> tuple[Phase, ...]:
    """The phases of a run; a step is one optimizer step, a checkpoint or export one of them.

    Args:
        run: what is trained, and on what.
        storage: of model and output.
        merge: an adapter's base and adapter are exported merged as well (`output.mergeAdapter`).
    """
    return _load(run, storage), _step(run), _checkpoint(run, storage), _export(run, storage, merge)


def stored_parameters(run: Run) -> int:
    """Numbers in a published model: the output layer is stored beside the embedding that it is tied to."""
    return run.shape.parameters + run.shape.embedding


def _load(run: Run, storage: Storage) -> Phase:
    """One rank reads each tensor, and the embedding once more to compare the output layer with it; what it
    has read goes round to the others."""
    read = (stored_parameters(run) + run.shape.embedding) * run.value_bytes
    # ZeRO-3 gathers a tensor before the reader's values replace it.
    sent = (2 if run.stage == 3 else 1) * run.shape.parameters * run.value_bytes if run.world > 1 else 0.0
    whole = 2 * run.shape.embedding * run.value_bytes
    return Phase(
        "load",
        gpu=_runtime(run) + _held(run) + whole,
        host=(weight_bytes(run) - _held(run)) * run.gpus_per_node,
        read=float(read),
        written=0.0,
        sent=sent,
        seconds=_in_turns(run, read / storage.read, sent),
    )


def _step(run: Run) -> Phase:
    memory, rows = gpu_memory(run), run.rows_per_step
    batches = -(-rows // run.micro_batch)
    seconds = None
    if run.gpu is not None:
        micro = micro_batch_seconds(run, run.gpu, rows / batches)
        seconds = batches * micro + step_seconds(run, run.gpu)
    share = (run.world - 1) / run.world
    gathered = (2 + run.recomputed) * run.shape.parameters if run.stage == 3 else 0.0
    reduced = run.trainable * run.summed_bytes * (2 if run.stage == 2 else 1)
    sent = share * batches * (gathered * run.value_bytes + reduced)
    return Phase("step", memory.needed, _offloaded(run), 0.0, 0.0, sent, seconds)


def _checkpoint(run: Run, storage: Storage) -> Phase:
    """Each rank copies its part of the optimizer and writes it beside the following steps."""
    written = float(run.trainable * OPTIMIZER_BYTES)
    nodes_part = written * run.gpus_per_node / run.world
    memory = gpu_memory(run)
    return Phase(
        "checkpoint",
        gpu=memory.needed,
        host=_offloaded(run) + nodes_part,
        read=0.0,
        written=written,
        sent=0.0,
        seconds=written / storage.write,
    )


def _export(run: Run, storage: Storage, merge: bool) -> Phase:
    """Tensor by tensor through one rank, which holds none longer than until it is written."""
    whole = run.method == "full" or merge
    adapter = 0 if run.method == "full" else run.trainable
    written = float((adapter + (stored_parameters(run) if whole else 0)) * run.value_bytes)
    sent = float(run.shape.parameters * run.value_bytes) if whole and run.stage == 3 else 0.0
    tensor = run.shape.embedding * run.value_bytes if whole else 0
    matrix = run.shape.hidden * run.shape.intermediate * (run.value_bytes + MERGED_IN) if merge else 0
    return Phase(
        "export",
        gpu=_runtime(run) + _held(run) + tensor,
        host=_offloaded(run) + max(tensor, matrix),
        read=0.0,
        written=written,
        sent=sent,
        seconds=_in_turns(run, written / storage.write, sent),
    )


def _in_turns(run: Run, storage_seconds: float, sent: float) -> float | None:
    """Reading or writing a tensor and sending it take turns."""
    if run.gpu is None:
        return None
    return storage_seconds + sent / ring_bandwidth(run, run.gpu)


def _held(run: Run) -> float:
    """Weights that a GPU keeps."""
    return 0.0 if run.offload == "parameters" else weight_bytes(run)


def _runtime(run: Run) -> float:
    return CUDA_CONTEXT + (NCCL_BUFFERS if run.world > 1 else 0.0)


def _offloaded(run: Run) -> float:
    return host_memory(run) * run.gpus_per_node
