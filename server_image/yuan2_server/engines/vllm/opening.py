"""vLLM, checked, loaded and warm."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yuan2_core.contract import ServeJob
from yuan2_core.engine import VllmOptions
from yuan2_core.errors import UserError
from yuan2_core.host_memory import available_bytes
from yuan2_core.processors import available_cpus
from yuan2_server.engines.vllm.arguments import (
    adapter_paths,
    check_ranks,
    cpu_cache_bytes,
    engine_arguments,
    one_line,
)
from yuan2_server.engines.vllm.engine import VllmEngine
from yuan2_server.job import EngineFailedError

if TYPE_CHECKING:
    from yuan2_model.dimensions import Dimensions

log = logging.getLogger(__name__)

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SPARE_BLOCKS = 2
"""Of each layer and request on a CPU: the filter's state takes a block, and the last one is partly filled."""
BLOCK_TOKENS = 128
"""vLLM's block on a CPU."""


def open_vllm(job: ServeJob, vllm: VllmOptions, dimensions: Dimensions, context: int) -> VllmEngine:
    """Start vLLM's processes and load the model.

    Raises:
        UserError: this image has no vLLM, or vLLM cannot serve this model like that.
        EngineFailedError: vLLM did not come up; its log says why.
    """
    _check_image()
    check_ranks(dimensions.num_attention_heads, max(1, job.worker.gpus))
    _prepare(job)
    cache = _cpu_cache(job, dimensions, context) if job.worker.device == "cpu" else None
    arguments = engine_arguments(job, vllm, context, cache)
    config = _config(arguments)

    def open_llm() -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)

    engine = VllmEngine(
        open_llm,
        job.worker.max_concurrent_requests,
        dimensions.vocab_size,
        _adapters(adapter_paths(job, vllm)),
    )
    try:
        engine.start()
    except Exception as error:
        log.error("vLLM did not start", exc_info=error)
        raise EngineFailedError(f"vLLM did not start: {one_line(error)}") from error
    return engine


def _check_image() -> None:
    if find_spec("vllm") is None:
        raise UserError(
            "worker.engine: this image has no vLLM; set worker.image to one that has (Dockerfile.serve), or "
            "worker.engine: builtin"
        )
    if not entry_points(group="vllm.general_plugins", name="yuan2"):
        raise UserError(
            "worker.engine: this image has vLLM, but not the plugin yuan2-vllm, which brings Yuan 2.0 to it"
        )


def _prepare(job: ServeJob) -> None:
    """Environment of vLLM's processes, where the pod's own does not say otherwise."""
    # A copy of this process, which has threads and signal handlers, would not be a clean start.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    wanted = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    if job.worker.device == "cpu":
        # vLLM would bind to the machine's cores, of which a pod has a share.
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(available_cpus())}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _config(arguments: Any) -> Any:
    try:
        return arguments.create_engine_config()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"worker: vLLM cannot serve this: {one_line(error)}") from error


def _cpu_cache(job: ServeJob, dimensions: Dimensions, context: int) -> int:
    """Bytes for the caches of all requests at their longest, or what fits."""
    size = ELEMENT_BYTES[job.worker.precision]
    width = max(dimensions.hidden_size, 32 * dimensions.num_attention_heads)
    tokens = context + SPARE_BLOCKS * BLOCK_TOKENS
    wanted = 2 * dimensions.num_hidden_layers * width * size * tokens * job.worker.max_concurrent_requests
    weights = sum(path.stat().st_size for path in Path(job.model_path).glob("*.safetensors"))
    return cpu_cache_bytes(available_bytes() or weights + wanted, weights, wanted)


def _adapters(paths: Mapping[str, str]) -> dict[str, Any]:
    if not paths:
        return {}
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(f"adapter-{n}", n, path) for n, (name, path) in enumerate(paths.items(), 1)}
