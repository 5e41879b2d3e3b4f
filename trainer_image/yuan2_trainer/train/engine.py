"""DeepSpeed's engine for a run, at its beginning or where a checkpoint left it."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from yuan2_core.contract import TrainJob
from yuan2_model import Yuan2ForCausalLM
from yuan2_model.attention import describe
from yuan2_trainer.checkpoint.manifest import Found
from yuan2_trainer.checkpoint.restoring import put_weights, restore, start_optimizer
from yuan2_trainer.model.deepspeed import build_engine
from yuan2_trainer.model.loading import load_for_training
from yuan2_trainer.model.precision import DTYPES, check_model

_LOG = logging.getLogger(__name__)


def load_engine(job: TrainJob, found: Found | None) -> Any:
    """DeepSpeed's engine, ready for the next step.

    Args:
        job: what to train.
        found: the checkpoint to go on from, or `None` for the first step.

    Raises:
        JobError: as `load_for_training`, also when a checkpoint or the engine changed a parameter's type.
    """
    model = load_for_training(job)
    if found is not None:
        put_weights(model, found)
    model.config.use_cache = False
    model.label_smoothing = job.training.label_smoothing
    model.model.noise_alpha = job.training.neftune_alpha
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
    check_model(engine.module, job)
    return engine


def _compute_layers_again(model: Yuan2ForCausalLM, job: TrainJob) -> None:
    # ZeRO-3 gathers weights in module hooks; the reentrant kind runs those again when it computes a
    # layer again. It needs inputs with a gradient, which a frozen embedding does not give either.
    model.gradient_checkpointing_enable({"use_reentrant": job.stage == 3})
    model.model.checkpoint_every = job.training.gradient_checkpointing_every
    if job.stage == 3:
        model.enable_input_require_grads()
