"""The model of a run, on its device and in its precision, from the model directory or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from yuan2_core.contract import TrainJob
from yuan2_model import load_model
from yuan2_trainer.checkpoint import load_master_weights, restore, start_optimizer
from yuan2_trainer.deepspeed import build_engine
from yuan2_trainer.manifest import Found

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_engine(job: TrainJob, found: Found | None) -> Any:
    """DeepSpeed's engine, ready for the next step.

    Args:
        job: what to train.
        found: the checkpoint to go on from, or `None` for the first step.
    """
    model = load_model(Path(job.model.path), dtype=DTYPES[job.training.precision])
    if found is not None:
        load_master_weights(model, found)
    model.config.use_cache = False
    if job.training.gradient_checkpointing:
        # ZeRO-3 gathers weights in module hooks; the reentrant kind runs those again when it computes a
        # layer again.
        model.gradient_checkpointing_enable({"use_reentrant": job.stage == 3})
        if job.stage == 3:
            model.enable_input_require_grads()
    model.train()
    engine = build_engine(model, job.training, job.stage, job.launch.device)
    if found is None:
        start_optimizer(engine)
    else:
        restore(engine, found)
    return engine
