"""Which fields of a service's worker go with which engine, as rules of the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from yuan2_core.engine import OWNED_ARGUMENTS, REFUSED_ARGUMENTS, EngineArgument

EngineChoice = Literal["auto", "vllm", "builtin"]
Quantization = Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9][a-z0-9_-]*$")]

# The API server also judges the default of the section, `{}`, in which no field is set.
_GPUS = "(has(self.gpusPerWorker) && self.gpusPerWorker > 0)"
_VLLM = f"(has(self.engine) && (self.engine == 'vllm' || (self.engine == 'auto' && {_GPUS})))"
ADAPTER_RULE = (
    f"!has(self.spec.model.adapters) || size(self.spec.model.adapters) == 0 || "
    f"(has(self.spec.worker) && {_VLLM.replace('self.', 'self.spec.worker.')})",
    "model.adapters: the built-in engine has none; set worker.engine: vllm",
)
_ARGUMENT_NAMES = "self.all(name, name.matches('^[a-z][a-z0-9-]*$'))"

ENGINE_RULES = (
    (
        f"!{_GPUS} || self.gpusPerWorker == 1 || !has(self.engine) || self.engine != 'builtin'",
        "worker.gpusPerWorker: the built-in engine computes on one GPU; set worker.engine: vllm",
    ),
    *(
        (
            f"!has(self.{field}) || {_VLLM}",
            f"worker.{field}: the built-in engine has none; set worker.engine: vllm",
        )
        for field in ("quantization", "prefixCaching")
    ),
    (
        f"!has(self.engineArgs) || size(self.engineArgs) == 0 || {_VLLM}",
        "worker.engineArgs: the built-in engine has none; set worker.engine: vllm",
    ),
    (
        f"!has(self.gpuMemoryUtilization) || ({_GPUS} && {_VLLM})",
        "worker.gpuMemoryUtilization: only vLLM on GPUs takes a share of their memory; leave it out",
    ),
)

ARGUMENT_RULES = (
    (_ARGUMENT_NAMES, "engineArgs: write the options of vLLM's command line without the dashes in front"),
    *(
        (f"!('{name}' in self)", f"engineArgs: {name} is set by {field}; use that field")
        for name, field in OWNED_ARGUMENTS.items()
    ),
    *(
        (f"!('{name}' in self)", f"engineArgs: {name} is not supported: {reason}")
        for name, reason in REFUSED_ARGUMENTS.items()
    ),
)

EngineArguments = Annotated[dict[str, EngineArgument], Field(max_length=64)]
