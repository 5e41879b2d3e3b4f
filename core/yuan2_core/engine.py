"""What a serving worker tells vLLM, and which of its options are not the user's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from yuan2_core.document import Contract

Share = Annotated[float, Field(gt=0, le=1)]
EngineArgument = Annotated[str, Field(max_length=1024)]

OWNED_ARGUMENTS = {
    "model": "model",
    "tokenizer": "model",
    "served-model-name": "model.name",
    "dtype": "worker.precision",
    "max-model-len": "worker.maxModelLength",
    "max-num-seqs": "worker.maxConcurrentRequests",
    "tensor-parallel-size": "worker.gpusPerWorker",
    "gpu-memory-utilization": "worker.gpuMemoryUtilization",
    "quantization": "worker.quantization",
    "enable-prefix-caching": "worker.prefixCaching",
    "no-enable-prefix-caching": "worker.prefixCaching",
}
"""Options of vLLM's command line that a field of the service sets."""

REFUSED_ARGUMENTS = {
    "speculative-config": "Yuan 2.0 cannot take back its filter's state when a drafted token is rejected",
    "pipeline-parallel-size": "vLLM cannot split Yuan 2.0 into stages; use gpusPerWorker for tensor parallel",
    "data-parallel-size": "a worker is one copy of the model; use worker.replicas",
    "trust-remote-code": "the model's code is the plugin's, and none of the model directory is run",
    "enable-lora": "adapters are those of the model, and model.adapters",
    "lora-modules": "adapters are those of the model, and model.adapters",
    "max-loras": "there is room for all of model.adapters",
    "max-lora-rank": "it follows from the adapters",
    "fully-sharded-loras": "not supported for Yuan 2.0",
    "runner": "the worker generates text",
    "convert": "the worker generates text",
    "skip-tokenizer-init": "the tokenizer says which rows of the embedding are tokens",
}
"""Options of vLLM's that no worker is started with, each with the reason."""


class VllmOptions(Contract):
    """Settings of vLLM that the built-in engine does not have."""

    gpu_memory_utilization: Share | None = None
    """Share of a GPU's memory for weights, activations and caches; absent, vLLM's own."""
    quantization: str | None = None
    """How weights are quantised, in vLLM's words; absent, not at all, or as config.json says."""
    prefix_caching: bool = True
    """Keep the caches of prompts' beginnings."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters beside the model, by the name that clients put into `model`: their directories in PEFT's
    layout."""
    engine_args: dict[str, EngineArgument] = Field(default_factory=dict)
    """Other options of vLLM's command line without the dashes in front, each with its value."""
