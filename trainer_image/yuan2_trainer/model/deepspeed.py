"""DeepSpeed's configuration for a job, and the engine made from it.

`engine_config` is pure; DeepSpeed itself is imported where it is used, because importing it takes seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from yuan2_core.contract import TrainJob
from yuan2_core.estimate import Shape
from yuan2_core.presets import PRESETS
from yuan2_core.sections import Offload
from yuan2_core.zero_limits import zero_3_limits
from yuan2_model.dimensions import Dimensions

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from yuan2_model import Yuan2ForCausalLM

ZERO_2: dict[str, Any] = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "overlap_comm": False,
    "contiguous_gradients": True,
}
"""The published recipe's ZeRO-2 section."""

ZERO_3: dict[str, Any] = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
}
"""ZeRO-3 with the defaults of DeepSpeed's documentation, written out so that a new release changes
nothing; `yuan2_core.zero_limits` has those that depend on the model."""

BUCKET_LIMIT_ON_CPU = 5e7
"""Communication buckets are allocated whole; half a billion numbers of one would fill a small machine's
memory."""


FLOPS_PROFILER: dict[str, Any] = {
    "enabled": True,
    "profile_step": 1,
    "module_depth": -1,
    "top_modules": 1,
    "detailed": True,
}
"""The published recipe's profiler section."""


def merged(ours: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `ours`: sections are merged, everything else is replaced."""
    both = dict(ours)
    for key, value in over.items():
        below = both.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            both[key] = merged(below, value)
        else:
            both[key] = value
    return both


def engine_config(
    job: TrainJob, own_bf16_wrapper: bool = False, shape: Shape | None = None
) -> dict[str, Any]:
    """The configuration as DeepSpeed reads it.

    Args:
        job: what to train; batch sizes are those of one rank.
        own_bf16_wrapper: whether this DeepSpeed accumulates bf16 gradients without ZeRO in fp32 (releases
        before 0.17
            demand it, later ones refuse it).
        shape: of the model; absent, that of a published size, and for a custom one DeepSpeed's own limits.
    """
    training, wanted = job.training, job.deepspeed
    if shape is None and job.model.size != "custom":
        shape = Shape.of(PRESETS[job.model.size])
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_section(job.stage, job.launch.device, wanted.offload, shape),
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if job.stage == 0 and training.precision == "bf16" and own_bf16_wrapper:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if training.fp32_gradients and training.precision == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if wanted.flops_profiler:
        config["flops_profiler"] = FLOPS_PROFILER
    return merged(config, wanted.overrides)


def zero_section(
    stage: int, device: str, offload: Offload = "none", shape: Shape | None = None
) -> dict[str, Any]:
    """The `zero_optimization` section of a stage; without a model's shape, without what depends on it."""
    section = dict({0: {"stage": 0}, 2: ZERO_2, 3: ZERO_3}[stage])
    if stage == 3 and shape is not None:
        section |= _by_size(shape)
    place = {"device": "cpu", "pin_memory": device == "cuda"}
    if offload != "none":
        section["offload_optimizer"] = place
    if offload == "parameters":
        section["offload_param"] = place
    if device == "cuda":
        return section
    return {
        key: min(value, BUCKET_LIMIT_ON_CPU) if key.endswith("bucket_size") else value
        for key, value in section.items()
    }


def _by_size(shape: Shape) -> dict[str, Any]:
    limits = zero_3_limits(shape.hidden, shape.layer)
    return {
        "stage3_prefetch_bucket_size": limits.prefetch,
        "stage3_param_persistence_threshold": limits.persistent,
        "stage3_max_live_parameters": limits.live,
        "stage3_max_reuse_distance": limits.live,
    }


def prepare_environment(device: str) -> None:
    """Settings that torch and DeepSpeed read when they are imported."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    # Packed rows and ZeRO-3 ask for blocks of ever other sizes, which would leave holes in the GPU's memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Nothing here is compiled, but DeepSpeed decorates an optimizer that nobody asked for with torch.compile,
    # which imports all of inductor: several seconds of every start.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU all-reduce for inference at start-up.

    It serves tensor-parallel inference only, needs a C++ compiler in the image and half a minute of the
    first start.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with weight decay, and those without: norms and biases, the vectors of a model.

    ZeRO-3 has emptied a parameter before this is called; its true number of axes is in `ds_shape`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, job: TrainJob) -> Optimizer:
    """AdamW, fused on GPUs and, where this torch can, on the CPU.

    The rate starts at 0 and is set before every step.
    """
    from torch.optim import AdamW

    groups = parameter_groups(model.named_parameters(), job.training.weight_decay)
    on_gpu = job.launch.device == "cuda" and job.deepspeed.offload == "none"
    fused = on_gpu or _fused_on_cpu()
    training = job.training
    betas = (training.adam_beta1, training.adam_beta2)
    return AdamW(groups, lr=0.0, betas=betas, eps=training.adam_epsilon, fused=fused)


def _fused_on_cpu() -> bool:
    """torch 2.4 brought the fused AdamW of the CPU (its release notes)."""
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 4)


def job_config(job: TrainJob, dimensions: Dimensions) -> dict[str, Any]:
    """`engine_config` of a job and its model, for the DeepSpeed that is installed."""
    from deepspeed.runtime import engine as engine_module

    own_wrapper = not hasattr(engine_module, "DDP_BFLOAT16")
    return engine_config(job, own_wrapper, Shape.of(dimensions))


def build_engine(model: Yuan2ForCausalLM, job: TrainJob) -> Any:
    """`deepspeed.initialize` for a loaded model; the process group exists already."""
    import deepspeed

    optimizer = build_optimizer(model, job)
    config = job_config(job, model.config.dimensions())
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine = made[0]
    if job.deepspeed.flops_profiler:
        engine.module.register_forward_pre_hook(_start_profilers_clock)
    return engine


def _start_profilers_clock(module: Any, _: object) -> None:
    """DeepSpeed 0.17 and later start the profiler in a hook of the model's own forward pass, too late for the
    hook that would set its clock: the profile would say that the pass began in 1970."""
    module.__start_time__ = time.time()
