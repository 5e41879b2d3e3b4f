"""The model of a run, in its precision, from the model directory or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yuan2_core.contract import TrainJob
from yuan2_model import Yuan2ForCausalLM, check_model_directory, load_model
from yuan2_model.dimensions import HEAD
from yuan2_model.weights import load_config, read_tensors
from yuan2_trainer.checkpoint import restore, start_optimizer
from yuan2_trainer.deepspeed import build_engine, job_config
from yuan2_trainer.manifest import Found
from yuan2_trainer.shards import ShardReader

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_engine(job: TrainJob, found: Found | None) -> Any:
    """DeepSpeed's engine, ready for the next step.

    Args:
        job: what to train.
        found: the checkpoint to go on from, or `None` for the first step.
    """
    dtype = DTYPES[job.training.precision]
    model = load_partitioned(job, dtype) if job.stage == 3 else load_model(job.model.path, dtype)
    if found is not None:
        reader = ShardReader(found)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # The optimizer's fp32 weights, rounded as an optimizer step rounds them.
        fill(model, ((name, reader.full(name)) for name in names))
    model.config.use_cache = False
    if job.training.gradient_checkpointing:
        # ZeRO-3 gathers weights in module hooks; the reentrant kind runs those again with the layer.
        model.gradient_checkpointing_enable({"use_reentrant": job.stage == 3})
        if job.stage == 3:
            model.enable_input_require_grads()
    model.train()
    engine = build_engine(model, job)
    if found is None:
        start_optimizer(engine)
    else:
        restore(engine, found)
    return engine


def load_partitioned(job: TrainJob, dtype: torch.dtype) -> Yuan2ForCausalLM:
    """The model cut over the ranks as ZeRO-3 keeps it: no rank ever holds more than one whole tensor."""
    import deepspeed

    facts = check_model_directory(Path(job.model.path))
    with deepspeed.zero.Init(config_dict_or_path=job_config(job), dtype=dtype):
        model = Yuan2ForCausalLM(load_config(facts))
    tied = facts.dimensions.tie_word_embeddings
    fill(model, (item for item in read_tensors(facts) if not (tied and item[0] == HEAD)))
    return model


def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set parameters by name; under ZeRO-3 rank 0's values are spread, and all ranks pass the same names."""
    import deepspeed

    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)
