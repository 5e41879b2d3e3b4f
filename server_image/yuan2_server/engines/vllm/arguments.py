"""From a job to vLLM's command line, which vLLM's own parser checks before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from yuan2_core.contract import ServeJob
from yuan2_core.engine import OWNED_ARGUMENTS, REFUSED_ARGUMENTS, VllmOptions
from yuan2_core.errors import UserError
from yuan2_server.engines.vllm.engine import BASE

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The bounds that vLLM takes for the rank of adapters."""
CPU_CACHE_SHARE = 0.5
"""Of what is free beside the weights; the rest is for activations and three processes' own memory."""


def engine_arguments(job: ServeJob, vllm: VllmOptions, context: int, cache_bytes: int | None) -> Any:
    """vLLM's `AsyncEngineArgs`.

    Args:
        job: what is served.
        vllm: its settings of vLLM.
        context: tokens of prompt and answer together.
        cache_bytes: memory for the caches; None lets vLLM measure a GPU's.

    Raises:
        UserError: vLLM has no such option, or not that value; one line that names the field.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"engineArgs: {_line(message)}")

    parser = AsyncEngineArgs.add_cli_args(Parser(allow_abbrev=False, add_help=False))
    options: Mapping[str, Any] = parser._option_string_actions
    given = user_arguments(vllm.engine_args, options)
    parsed = parser.parse_args([*own_arguments(job, vllm, context, cache_bytes), *given])
    return AsyncEngineArgs.from_cli_args(parsed)


def own_arguments(job: ServeJob, vllm: VllmOptions, context: int, cache_bytes: int | None) -> list[str]:
    """What the job's own fields say, as options."""
    worker = job.worker
    values: dict[str, object] = {
        "model": job.model_path,
        "served-model-name": job.served_name,
        "dtype": DTYPES[worker.precision],
        "max-model-len": context,
        "max-num-seqs": worker.max_concurrent_requests,
        "tensor-parallel-size": max(1, worker.gpus),
        "gpu-memory-utilization": vllm.gpu_memory_utilization,
        "quantization": vllm.quantization,
        "kv-cache-memory-bytes": cache_bytes,
    }
    adapters = [Path(path) for path in adapter_paths(job, vllm).values()]
    if adapters:
        values["max-lora-rank"] = max(map(lora_rank, adapters))
        values["max-loras"] = len(adapters)
    switches = [
        "enable-prefix-caching" if vllm.prefix_caching else "no-enable-prefix-caching",
        *(["enable-lora"] if adapters else []),
    ]
    pairs = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return [*pairs, *(f"--{name}" for name in switches)]


def adapter_paths(job: ServeJob, vllm: VllmOptions) -> dict[str, str]:
    """Directories of adapters by the name that asks for them; that of the model itself has an empty name."""
    own = {} if job.adapter_path is None else {BASE: job.adapter_path}
    return own | vllm.adapters


def user_arguments(given: Mapping[str, str], options: Mapping[str, Any]) -> list[str]:
    """`engineArgs` as options of a parser whose own are `options` (to argparse's actions).

    Raises UserError: an option that does not exist, that a field of ours sets, or that is refused.
    """
    found = []
    for name, value in sorted(given.items()):
        action = options.get(f"--{name}")
        if action is None:
            raise UserError(f"engineArgs: vLLM has no option {name}; leave it out")
        _check_free(name, action.option_strings)
        if action.nargs != 0:
            found.append(f"--{name}={value}")
        elif value == "true":
            found.append(f"--{name}")
        elif value == "false" and f"--no-{name}" in action.option_strings:
            found.append(f"--no-{name}")
        else:
            raise UserError(f"engineArgs: {name}: {value!r} is neither 'true' nor 'false'")
    return found


def _check_free(name: str, spellings: Iterable[str]) -> None:
    for spelling in spellings:
        bare = spelling.removeprefix("--").replace("_", "-")
        if bare in OWNED_ARGUMENTS:
            raise UserError(f"engineArgs: {name} is set by {OWNED_ARGUMENTS[bare]}; use that field")
        if bare in REFUSED_ARGUMENTS:
            raise UserError(f"engineArgs: {name} is not supported: {REFUSED_ARGUMENTS[bare]}")


def lora_rank(adapter: Path) -> int:
    """The least of vLLM's bounds for an adapter in PEFT's layout. Raises UserError for one that vLLM cannot
    serve."""
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if config.get("use_dora"):
        raise UserError(
            f"{path}: vLLM serves no DoRA adapter; merge it (output.mergeAdapter), "
            "or set worker.engine: builtin"
        )
    rank = int(config["r"])
    fitting = [bound for bound in LORA_RANKS if bound >= rank]
    if not fitting:
        raise UserError(
            f"{path}: r {rank} is more than the {LORA_RANKS[-1]} that vLLM serves; merge the adapter"
        )
    return fitting[0]


def cpu_cache_bytes(available: int, weights: int, wanted: int) -> int:
    """Bytes for the caches on a CPU: `wanted` for all requests at their longest, or the share of `available`
    that `weights` leave. Raises UserError when the weights leave nothing."""
    room = int((available - weights) * CPU_CACHE_SHARE)
    if room <= 0:
        raise UserError(
            f"worker.resources: the weights take {weights >> 20} MiB, and {available >> 20} MiB are free; "
            "give the pod more memory"
        )
    return min(room, wanted)


def check_ranks(heads: int, ranks: int) -> None:
    """Raises UserError when `ranks` GPUs cannot share the heads: each holds some of each half of them."""
    if heads % (2 * ranks):
        raise UserError(f"gpusPerWorker: {ranks} must divide {heads // 2}, half of the model's heads")


def _line(text: object) -> str:
    """The line of a message that says what is wrong; pydantic's come with a heading and an address."""
    lines = [line.strip() for line in str(text).splitlines()]
    said = [line for line in lines if line and not line.startswith("For further information")]
    if len(said) > 1 and " validation error" in said[0]:
        return said[1].removeprefix("Value error, ").partition(" [type=")[0]
    return said[0] if said else str(text)


def one_line(error: Exception) -> str:
    """What an error of vLLM's configuration says, on one line."""
    return _line(error)
