"""The model of a run, in its precision, with what its method trains."""

from __future__ import annotations

from pathlib import Path

import torch

from yuan2_core.conflicts import adapter_of
from yuan2_core.contract import TrainJob
from yuan2_model import Yuan2ForCausalLM, check_model_directory
from yuan2_model.weights import empty_model, place_weights
from yuan2_trainer.model.deepspeed import job_config
from yuan2_trainer.model.partitioned import load_partitioned
from yuan2_trainer.model.precision import DTYPES, check_model, require_precision
from yuan2_trainer.model.spreading import spread_tensors


def load_for_training(job: TrainJob) -> Yuan2ForCausalLM:
    """The model with what its method trains: everything, or an adapter beside frozen weights.

    Raises:
        ModelFilesError: as `yuan2_model.load_model`.
        JobError: the device cannot compute in the job's precision, or a parameter did not get it.
    """
    require_precision(job)
    adapter = adapter_of(job.method)
    if job.method.qlora is not None:
        from yuan2_trainer.model.quantised import load_quantised

        # Quantised where it stays: what moves later is a quarter of the size.
        model = load_quantised(Path(job.model.path), torch.device(job.launch.device))
    elif job.stage == 3:
        directory = Path(job.model.path)
        dimensions = check_model_directory(directory).dimensions
        model = load_partitioned(directory, job_config(job, dimensions))
    else:
        model = _load_whole(job)
    if adapter is not None:
        from yuan2_trainer.model.adapters import add_adapter

        torch.manual_seed(job.training.seed)  # the same first matrices however the model was loaded
        model = add_adapter(model, adapter, job.model.path)
    check_model(model, job)
    return model


def _load_whole(job: TrainJob) -> Yuan2ForCausalLM:
    """Straight to where it is computed: through the host, it would be there once a process."""
    facts, dtype = check_model_directory(Path(job.model.path)), DTYPES[job.training.precision]
    device = torch.device(job.launch.device)
    model = empty_model(facts, dtype)
    place_weights(model, spread_tensors(facts, dtype, device), device)
    return model
