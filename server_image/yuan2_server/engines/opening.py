"""The engine that a job names, loaded and warm. Each imports only what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yuan2_core.contract import ServeJob
from yuan2_core.errors import UserError
from yuan2_server.engines.seam import Engine

if TYPE_CHECKING:
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model.dimensions import Dimensions


def open_engine(job: ServeJob, tokenizer: Yuan2Tokenizer, dimensions: Dimensions, context: int) -> Engine:
    """Load the model; the first answer is as fast as the others.

    Args:
        job: what is served, and with which engine.
        tokenizer: its tokenizer.
        dimensions: of its config.json.
        context: tokens of prompt and answer together.

    Raises:
        UserError: the engine cannot serve this model like that.
    """
    if job.worker.vllm is not None:
        from yuan2_server.engines.vllm.opening import open_vllm

        return open_vllm(job, job.worker.vllm, dimensions, context)
    if job.worker.gpus > 1:
        raise UserError(
            f"gpusPerWorker: {job.worker.gpus} is more than the built-in engine computes on, which is 1; "
            "set worker.engine: vllm"
        )
    from yuan2_server.engines.builtin.opening import open_builtin

    return open_builtin(job, tokenizer.vocab_size, context)
