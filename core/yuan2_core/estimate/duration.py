"""Time of a training: arithmetic, and the exchange between GPUs that it waits for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from yuan2_core.conflicts import MethodName
from yuan2_core.estimate.gpus import Gpu
from yuan2_core.estimate.run import Run

EFFICIENCY: Final[Mapping[MethodName, float]] = {"full": 0.46, "lora": 0.36, "qlora": 0.39}
"""Share of the attainable rate that a method's arithmetic reaches. Calibrated, one number a method, on all
rows of the published tables."""
ATTAINABLE_INTENSITY: Final = 140.0
"""FLOP for each byte of memory traffic in the training of a transformer without fused kernels: it bounds the
rate of a GPU with many FLOP and little bandwidth (roofline model, Williams et al. 2009). Calibrated on the
published tables: L20 and L40S have the same bandwidth; the L40S has thrice the FLOP and is no faster."""
LINK_EFFICIENCY: Final = 0.7
"""Share of a link's bandwidth that NCCL's rings reach: about 200 of 300 GB/s on A100 (NVIDIA/nccl-tests
issue 149), 370 of 450 GB/s on H100 (issue 212)."""
NETWORK_BANDWIDTH: Final = 12.5e9
"""Bytes a second between nodes, 100 Gb/s a node: an assumption, a run does not say."""
HOST_LINK: Final = 25e9
"""Bytes a second between a GPU and pinned host memory over 16 lanes of PCIe 4.0, as copies reach it."""
HOST_MEMORY_BANDWIDTH: Final = 20e9
"""Bytes a second of the host's memory for each GPU: a server's 160 to 200 GB/s among eight."""
ADAM_TRAFFIC: Final = 28
"""Bytes that AdamW reads and writes for each weight: gradient once, master weight and moments twice."""


def train_seconds(run: Run) -> float | None:
    """Seconds of all optimizer steps; None when the GPU, or both steps and data, are not known."""
    if run.gpu is None or run.steps is None:
        return None
    rows = run.rows_per_step
    micro_batches = math.ceil(rows / run.micro_batch)
    micro = micro_batch_seconds(run, run.gpu, rows / micro_batches)
    return run.steps * (micro_batches * micro + step_seconds(run, run.gpu))


def micro_batch_seconds(run: Run, gpu: Gpu, rows: float) -> float:
    """Seconds of a micro batch of so many rows, forward and backward.

    ZeRO-3 gathers parameters while it computes; ZeRO-2 reduces gradients when it has computed (the recipe's
    `overlap_comm` is off there).
    """
    flops = micro_batch_flops(run) * rows / run.micro_batch
    compute = flops / (EFFICIENCY[run.method] * attainable_flops(gpu, run.value_bytes))
    exchange = _micro_exchange(run) / ring_bandwidth(run, gpu)
    if run.stage == 3:
        return max(compute, exchange, _from_host(run))
    return compute + exchange


def attainable_flops(gpu: Gpu, value_bytes: int) -> float:
    """FLOP/s within the roofline; fp32 runs as TF32, at half the rate and twice the traffic."""
    bound = min(gpu.bf16_flops, ATTAINABLE_INTENSITY * gpu.memory_bandwidth)
    return bound * 2 / value_bytes


def micro_batch_flops(run: Run) -> float:
    """FLOP of a full micro batch on one GPU.

    A forward pass takes 2 FLOP a weight and token, and 2 T H a layer and token for causal attention over T
    tokens; a backward pass takes that once for the activations and once more for the weights where they are
    trained; checkpointing computes the forward pass again.
    """
    row = run.length if run.data is None else run.data.row_tokens(run.length)
    tokens = run.micro_batch * row
    attention = 2 * run.shape.layers * row * run.shape.hidden
    forward = (2 * run.shape.parameters + attention) * tokens
    passes = (3 if run.method == "full" else 2) + run.recomputed
    return forward * passes


def ring_bandwidth(run: Run, gpu: Gpu) -> float:
    """Bytes a second through the slowest link of NCCL's ring."""
    within = gpu.link_bandwidth
    return LINK_EFFICIENCY * (min(within, NETWORK_BANDWIDTH) if run.nodes > 1 else within)


def _micro_exchange(run: Run) -> float:
    """Bytes that a GPU sends in each micro batch.

    ZeRO-2 sums each bucket of gradients over all ranks, whoever keeps it: twice its bytes. ZeRO-3 gathers
    every weight for forward pass, recomputation and backward pass, and scatters the gradients.
    """
    share = (run.world - 1) / run.world
    gradients = run.trainable * run.summed_bytes * share
    if run.stage == 2:
        return 2 * gradients
    if run.stage == 3:
        return _gathers(run) * run.shape.parameters * run.value_bytes * share + gradients
    return 0.0


def _gathers(run: Run) -> float:
    return 2 + run.recomputed


def _from_host(run: Run) -> float:
    if run.offload != "parameters":
        return 0.0
    return _gathers(run) * run.shape.parameters * run.value_bytes / run.world / HOST_LINK


def step_seconds(run: Run, gpu: Gpu) -> float:
    """What a step adds to its micro batches: weights or gradients around the ring, and AdamW on the host.

    AdamW on the GPU is a few passes over its share of the state: nothing beside a step.
    """
    share = (run.world - 1) / run.world
    trained = run.trainable * run.value_bytes
    ring = {0: 2 * trained * share, 2: trained * share, 3: 0.0}[run.stage] / ring_bandwidth(run, gpu)
    if run.offload == "none":
        return ring
    mine = run.trainable / run.shards
    return ring + mine * (2 * run.value_bytes / HOST_LINK + ADAM_TRAFFIC / HOST_MEMORY_BANDWIDTH)
