"""Model FLOPs utilisation: what a step asks of the GPUs, over what they could do."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist

from yuan2_core.contract import TrainJob
from yuan2_core.estimate import find_gpu
from yuan2_model.dimensions import Dimensions
from yuan2_model.flops import model_flops
from yuan2_trainer.model.methods import trainable_parameters


@dataclass(frozen=True)
class Meter:
    """Knows the model's FLOPs and the peak of all ranks together."""

    dimensions: Dimensions
    adapter: int | None
    """Weights of the adapter, None where all weights are trained."""
    peak: float | None
    """FLOP/s; None on CPU and on a GPU whose data sheet is not known."""

    @classmethod
    def of(cls, job: TrainJob, dimensions: Dimensions) -> Meter:
        """Of this process' device; ranks are alike."""
        adapter = None if job.method.full else trainable_parameters(job.method, dimensions)
        peak = None
        if job.launch.device == "cuda":
            name = torch.cuda.get_device_name()
            peak = peak_flops(name, job.training.precision, job.training.tf32)
        return cls(dimensions, adapter, None if peak is None else peak * dist.get_world_size())

    def mfu(self, tokens: int, pairs: int, labelled: int, seconds: float) -> float | None:
        """Utilisation in a step, between 0 and 1; the work is described as for `model_flops`."""
        if not self.peak or seconds <= 0:
            return None
        return model_flops(self.dimensions, tokens, pairs, labelled, self.adapter) / seconds / self.peak


def peak_flops(gpu: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of a GPU's matrix units, dense (data sheet); TF32 runs at half the rate of bf16.

    Args:
        gpu: its name as the driver has it.
        precision: `bf16` or `fp32`.
        tf32: whether fp32 matrices are multiplied in TF32; None without it, for that is not what the matrix
            units do.
    """
    known = find_gpu(gpu)
    if known is None or (precision == "fp32" and not tf32):
        return None
    return known.bf16_flops / (1 if precision == "bf16" else 2)


def memory_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
