"""Memory of a GPU in training, part by part.

Every term is a count of numbers times their bytes; what cannot be counted is a named constant with its
source.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from yuan2_core.estimate.run import Run

OPTIMIZER_BYTES: Final = 12
"""AdamW's fp32 master weight and two fp32 moments (ZeRO, arXiv 1910.02054, section 3.1)."""
NF4_BYTES: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: 4 bits, an 8-bit scale a block of 64, an fp32 scale per 256 of those (arXiv
2305.14314)."""
BUCKET: Final = 5e8
"""Numbers of a communication bucket (the published recipe's `reduce_bucket_size`); allocated whole."""
LOGITS_COPIES: Final = 3
"""Copies of [tokens, vocabulary] alive at once in the published code: logits, their shifted copy and
log-softmax in the forward pass; log-softmax and two gradients in the backward pass."""
LOSS_CHUNK: Final = 1 << 26
"""Logits that `yuan2_model.loss` holds at once: in fp32, and beside them their product and their gradient in
the weights' type."""
CUDA_CONTEXT: Final = 1.2e9
"""CUDA context, PyTorch's kernels and the workspaces of cuBLAS and cuDNN. Calibrated on the QLoRA rows of the
published tables."""
NCCL_BUFFERS: Final = 1.0e9
"""Buffers of NCCL's channels for up to eight peers. Calibrated on the full rows of the published tables."""
ZERO_3_RESERVE: Final = 1.25
"""Bytes that PyTorch's allocator keeps beside each live byte when parameters of many sizes come and go under
ZeRO-3. It returns them when memory runs out, so they decide what a monitor shows, not what fits. Calibrated
on the LoRA rows of the published tables (34 GB and 43 GB are reported for one and the same job)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by what they hold, at the moment of a step when they are most.

    Attributes:
        weights: parameters, or this rank's share under ZeRO-3.
        gradients: this rank's share from ZeRO-2 on.
        optimizer: master weights and moments, this rank's share from ZeRO-2 on.
        gathered: parameters of other ranks that ZeRO-3 holds for a while.
        buckets: communication buckets.
        activations: each layer's input; without checkpointing, all that each layer keeps for the way back.
        working: the larger of the loss (logits, their gradients) and a layer computed again, which follow one
            another; and the gradient of the tied output layer, which waits for the embedding's.
        runtime: CUDA and NCCL.
        reserve: what the allocator keeps and would give back.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    buckets: float
    activations: float
    working: float
    runtime: float
    reserve: float

    @property
    def total(self) -> float:
        """What a monitor shows."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def needed(self) -> float:
        """What must fit."""
        return self.total - self.reserve


def gpu_memory(run: Run) -> Memory:
    """Memory of each GPU of a run; the reserve stays within the GPU when it is known."""
    working, gathered, buckets = _working(run), _gathered(run), _buckets(run)
    moved = run.offload != "none"
    parts = Memory(
        weights=0.0 if run.offload == "parameters" else weight_bytes(run),
        gradients=0.0 if moved else _gradients(run),
        optimizer=0.0 if moved else _optimizer(run),
        gathered=gathered,
        buckets=buckets,
        activations=_activations(run),
        working=working,
        runtime=CUDA_CONTEXT + (NCCL_BUFFERS if run.world > 1 else 0.0),
        reserve=0.0,
    )
    reserve = ZERO_3_RESERVE * (gathered + buckets + working) if run.stage == 3 else 0.0
    if run.gpu is not None:
        reserve = max(0.0, min(reserve, run.gpu.memory_bytes - parts.needed))
    return Memory(**{**vars(parts), "reserve": reserve})


def host_memory(run: Run) -> float:
    """Bytes that offloading puts into the host's memory for each GPU: gradients are kept in fp32 there."""
    if run.offload == "none":
        return 0.0
    optimizer = run.trainable * (OPTIMIZER_BYTES + 4) / run.shards
    return optimizer + (weight_bytes(run) if run.offload == "parameters" else 0.0)


def weight_bytes(run: Run) -> float:
    """Of all weights, or of a rank's share of them under ZeRO-3, in the type that they are kept in."""
    shape = run.shape
    adapters = 0 if run.method == "full" else run.trainable
    if run.method == "qlora":
        quantised = shape.layers * (shape.layer if run.software.quantised_filter else shape.layer_linears)
        rest = shape.parameters - quantised + adapters
        return quantised * NF4_BYTES + rest * run.value_bytes
    if run.stage != 3:
        return (shape.parameters + adapters) * run.value_bytes
    whole = 0 if run.method == "full" else run.persistent_adapter
    return ((shape.parameters + adapters - whole) / run.world + whole) * run.value_bytes


def _gradients(run: Run) -> float:
    """Without ZeRO, DeepSpeed adds bf16 gradients up in an fp32 copy."""
    summed_apart = run.stage == 0 and run.value_bytes == 2
    return run.trainable * (run.summed_bytes + (4 if summed_apart else 0)) / run.shards


def _optimizer(run: Run) -> float:
    """Without ZeRO, fp32 weights are their own master copy."""
    own_master = run.stage == 0 and run.value_bytes == 4
    return run.trainable * (OPTIMIZER_BYTES - (4 if own_master else 0)) / run.shards


def _gathered(run: Run) -> float:
    """The window of live parameters, the largest module, and a layer while it is copied out of its bucket."""
    if run.stage != 3:
        return 0.0
    shape = run.shape
    window = min(run.zero_3.live, shape.parameters)
    return (window + shape.embedding + shape.layer) * run.value_bytes


def _buckets(run: Run) -> float:
    """Gradients on their way to other ranks and, under ZeRO-2, new weights on their way back."""
    if run.stage == 0:
        return 0.0
    returned = min(BUCKET, run.trainable) if run.stage == 2 else 0.0
    return BUCKET * run.summed_bytes + returned * run.value_bytes


def _activations(run: Run) -> float:
    vectors = run.recomputed + (1 - run.recomputed) * run.software.layer_vectors
    return run.shape.layers * vectors * _vector(run)


def _working(run: Run) -> float:
    layer = run.software.layer_vectors * _vector(run) if run.checkpointing else 0.0
    logits, sums = _loss(run)
    learned = run.shape.embedding if run.method == "full" else 0
    return max(layer, logits + learned * sums) + learned * run.value_bytes


def _loss(run: Run) -> tuple[float, int]:
    """Bytes of logits held at once, and of sums held meanwhile for each weight of a trained output layer.

    A chunked loss adds the chunks' gradients up in fp32.
    """
    size = run.value_bytes
    all_logits = run.tokens * run.shape.vocabulary
    if not run.software.chunked_loss:
        return float(LOGITS_COPIES * all_logits * size), 0
    return min(all_logits, LOSS_CHUNK) * (4.0 + 2 * size), 4


def _vector(run: Run) -> int:
    """Bytes of one hidden state for each token of a micro batch."""
    return run.tokens * run.shape.hidden * run.value_bytes
