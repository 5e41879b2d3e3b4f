"""The model of a run, in its precision, from the model directory or from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from yuan2_core.conflicts import adapter_of
from yuan2_core.contract import TrainJob
from yuan2_model import Yuan2ForCausalLM, load_model
from yuan2_model.attention import describe
from yuan2_trainer.checkpoint import restore, start_optimizer
from yuan2_trainer.deepspeed import build_engine, job_config
from yuan2_trainer.manifest import Found
from yuan2_trainer.partitioned import fill, load_partitioned
from yuan2_trainer.shards import ShardReader

_LOG = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_engine(job: TrainJob, found: Found | None) -> Any:
    """DeepSpeed's engine, ready for the next step.

    Args:
        job: what to train.
        found: the checkpoint to go on from, or `None` for the first step.
    """
    model = load_for_training(job)
    if found is not None:
        put_weights(model, found)
    model.config.use_cache = False
    if job.training.gradient_checkpointing:
        _compute_layers_again(model, job)
    model.train()
    engine = build_engine(model, job)
    if dist.get_rank() == 0:
        _LOG.info("attention: %s", describe(engine.device, DTYPES[job.training.precision]))
    if found is None:
        start_optimizer(engine)
    else:
        restore(engine, found)
    return engine


def put_weights(model: nn.Module, found: Found) -> None:
    """Give a model the trained weights of a checkpoint: the optimizer's, rounded as an optimizer step rounds
    them."""
    reader = ShardReader(found)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    fill(model, ((name, reader.full(name)) for name in names))


def load_for_training(job: TrainJob) -> Yuan2ForCausalLM:
    """The model with what its method trains: everything, or an adapter beside frozen weights."""
    adapter = adapter_of(job.method)
    if job.method.qlora is not None:
        from yuan2_trainer.quantised import load_quantised

        # Quantised where it stays: what moves later is a quarter of the size.
        model = load_quantised(Path(job.model.path), torch.device(job.launch.device))
    elif job.stage == 3:
        model = load_partitioned(Path(job.model.path), DTYPES[job.training.precision], job_config(job))
    else:
        model = load_model(Path(job.model.path), dtype=DTYPES[job.training.precision])
    if adapter is not None:
        from yuan2_trainer.adapters import add_adapter

        torch.manual_seed(job.training.seed)  # the same first matrices however the model was loaded
        model = add_adapter(model, adapter, job.model.path)
    return model


def _compute_layers_again(model: Yuan2ForCausalLM, job: TrainJob) -> None:
    # ZeRO-3 gathers weights in module hooks; the reentrant kind runs those again when it computes a
    # layer again. It needs inputs with a gradient, which a frozen embedding does not give either.
    model.gradient_checkpointing_enable({"use_reentrant": job.stage == 3})
    model.model.checkpoint_every = job.training.gradient_checkpointing_every
    if job.stage == 3:
        model.enable_input_require_grads()
