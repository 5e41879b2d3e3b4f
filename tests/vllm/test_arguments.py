"""A worker's job as vLLM's own parser and configuration take it, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.serving import serve_job
from tests.vllm.engines import Tiny
from yuan2_core.engine import OWNED_ARGUMENTS, REFUSED_ARGUMENTS, VllmOptions
from yuan2_core.errors import UserError
from yuan2_server.engines.vllm.arguments import engine_arguments


def arguments(tiny: Tiny, vllm: VllmOptions, **worker: Any) -> Any:
    job = serve_job(tiny.directory, "http://controller", **worker)
    return engine_arguments(job, vllm, 128, 1 << 20)


def test_fields_and_arguments_arrive(tiny: Tiny) -> None:
    vllm = VllmOptions(prefix_caching=False, engine_args={"block-size": "64", "enforce-eager": "true"})
    found = arguments(tiny, vllm, max_concurrent_requests=3)
    config = found.create_engine_config()
    assert (config.model_config.max_model_len, config.scheduler_config.max_num_seqs) == (128, 3)
    assert (config.cache_config.block_size, config.cache_config.enable_prefix_caching) == (64, False)
    assert config.cache_config.kv_cache_memory_bytes == 1 << 20
    assert config.model_config.enforce_eager


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"no-such-option": "1"}, "engineArgs: vLLM has no option no-such-option"),
        ({"max-num-batched-token": "64"}, "engineArgs: vLLM has no option max-num-batched-token"),
        ({"block-size": "many"}, "engineArgs: argument --block-size"),
        ({"dtype": "half"}, "engineArgs: dtype is set by worker.precision"),
    ],
)
def test_what_vllm_does_not_take_is_one_line(tiny: Tiny, given: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        arguments(tiny, VllmOptions(engine_args=given))
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_a_quantization_that_vllm_does_not_have_is_refused(tiny: Tiny) -> None:
    with pytest.raises((UserError, ValueError), match="int3"):
        arguments(tiny, VllmOptions(quantization="int3")).create_engine_config()


@pytest.mark.parametrize("name", sorted({*OWNED_ARGUMENTS, *REFUSED_ARGUMENTS}))
def test_the_options_that_are_refused_exist(tiny: Tiny, name: str) -> None:
    """Else a new version of vLLM would have them under another name."""
    if name == "lora-modules":
        return  # of vLLM's own API server
    with pytest.raises(UserError, match=f"engineArgs: {name} is (set by|not supported)"):
        arguments(tiny, VllmOptions(engine_args={name: "1"}))
