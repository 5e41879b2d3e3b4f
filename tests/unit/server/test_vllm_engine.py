"""How a job and its requests are put into vLLM's words; vLLM itself is not needed for it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.serving import serve_job
from yuan2_core.engine import OWNED_ARGUMENTS, REFUSED_ARGUMENTS, VllmOptions
from yuan2_core.errors import UserError
from yuan2_server.engines.vllm.arguments import (
    check_ranks,
    cpu_cache_bytes,
    lora_rank,
    one_line,
    own_arguments,
    user_arguments,
)
from yuan2_server.engines.vllm.sampling import check, settings, tokens_of
from yuan2_server.protocol import RequestError
from yuan2_server.sequence import SampledToken, SamplingParams


def options() -> dict[str, argparse.Action]:
    """A parser with an option of each kind, and those that are ours or refused."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--quantization", "--quant")
    for name in {*OWNED_ARGUMENTS, *REFUSED_ARGUMENTS} - {
        "enable-prefix-caching",
        "no-enable-prefix-caching",
        "quantization",
    }:
        parser.add_argument(f"--{name}")
    return parser._option_string_actions


def test_engine_arguments_become_options():
    given = {"block-size": "32", "enforce-eager": "true", "quiet": "true"}
    assert user_arguments(given, options()) == ["--block-size=32", "--enforce-eager", "--quiet"]
    assert user_arguments({"enforce-eager": "false"}, options()) == ["--no-enforce-eager"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("block-sizes", "1", "engineArgs: vLLM has no option block-sizes; leave it out"),
        ("enforce-eager", "yes", "engineArgs: enforce-eager: 'yes' is neither 'true' nor 'false'"),
        ("quiet", "false", "engineArgs: quiet: 'false' is neither 'true' nor 'false'"),
        ("quant", "fp8", "engineArgs: quant is set by worker.quantization; use that field"),
        ("no-enable-prefix-caching", "true", "engineArgs: no-enable-prefix-caching is set by worker.prefixC"),
        *((name, "1", f"engineArgs: {name} is set by {field}") for name, field in OWNED_ARGUMENTS.items()),
        *(
            (name, "1", f"engineArgs: {name} is not supported: {why}")
            for name, why in REFUSED_ARGUMENTS.items()
        ),
    ],
)
def test_an_argument_that_is_not_the_users_is_refused_by_name(name, value, sentence):
    with pytest.raises(UserError) as refused:
        user_arguments({name: value}, options())
    assert str(refused.value).startswith(sentence)


def test_the_jobs_own_fields_become_options(tmp_path):
    vllm = VllmOptions(gpu_memory_utilization=0.5, quantization="fp8", prefix_caching=False)
    job = serve_job(tmp_path, "http://c", gpus=2, precision="bf16", max_concurrent_requests=3)
    assert own_arguments(job, vllm, 128, 4096) == [
        f"--model={tmp_path}",
        "--served-model-name=yuan2",
        "--dtype=bfloat16",
        "--max-model-len=128",
        "--max-num-seqs=3",
        "--tensor-parallel-size=2",
        "--gpu-memory-utilization=0.5",
        "--quantization=fp8",
        "--kv-cache-memory-bytes=4096",
        "--no-enable-prefix-caching",
    ]


@pytest.mark.parametrize(("rank", "bound"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_adapters_of_any_rank_find_their_bound(tmp_path: Path, rank, bound):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    job = serve_job(tmp_path, "http://c").model_copy(update={"adapter_path": str(tmp_path)})
    assert lora_rank(tmp_path) == bound
    arguments = own_arguments(job, VllmOptions(), 128, None)
    assert f"--max-lora-rank={bound}" in arguments
    assert "--max-loras=1" in arguments
    assert "--enable-lora" in arguments


def test_adapters_share_the_largest_rank_and_have_room_for_all(tmp_path: Path):
    for name, rank in (("a", 4), ("b", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    vllm = VllmOptions(adapters={name: str(tmp_path / name) for name in "ab"})
    arguments = own_arguments(serve_job(tmp_path, "http://c"), vllm, 128, None)
    assert {"--max-lora-rank=64", "--max-loras=2", "--enable-lora"} <= set(arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"r": 8, "use_dora": True}, "no DoRA adapter"), ({"r": 1000}, "r 1000 is more than the 512")],
)
def test_adapters_that_vllm_does_not_serve_are_refused(tmp_path: Path, config, words):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        lora_rank(tmp_path)


def test_memory_for_caches_is_what_is_wanted_or_half_of_what_is_left():
    assert cpu_cache_bytes(100, 20, 10) == 10
    assert cpu_cache_bytes(100, 20, 1000) == 40
    with pytest.raises(UserError, match=r"worker\.resources: .*more memory"):
        cpu_cache_bytes(100, 100, 10)


def test_the_heads_must_be_shared_evenly():
    check_ranks(32, 16)
    with pytest.raises(UserError, match="gpusPerWorker: 3 must divide 16, half of the model's heads"):
        check_ranks(32, 3)


def test_an_error_of_pydantic_is_told_on_one_line():
    text = (
        "1 validation error for ModelConfig\n  Value error, Unknown quantization: int3 [type=value_error, "
        "input_value=x]\n    For further information visit https://errors.pydantic.dev"
    )
    assert one_line(ValueError(text)) == "Unknown quantization: int3"
    assert one_line(ValueError("first\nsecond")) == "first"


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 5, **changes})


def test_every_parameter_is_passed_on():
    given = params(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=-1,
        logprobs=3,
        stop_token_ids=frozenset({7, 3, 9999}),
    )
    assert settings(given, 100) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "max_tokens": 5,
        "seed": 2**63 - 1,
        "logprobs": 3,
        "stop_token_ids": [3, 7],
        "ignore_eos": True,
        "detokenize": False,
    }


@pytest.mark.parametrize(
    "greedy", [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 0.0}]
)
def test_greedy_is_what_the_built_in_engine_takes_for_it(greedy):
    found = settings(params(**greedy), 100)
    assert (found["temperature"], found["top_p"], found["top_k"]) == (0.0, 1.0, 0)


def test_a_temperature_that_vllm_would_change_is_refused():
    for fine in (0.0, 1e-6, 0.01, 2.0):
        check(params(temperature=fine))
    with pytest.raises(RequestError, match=r"temperature: 0\.001 is less than 0\.01") as refused:
        check(params(temperature=0.001))
    assert refused.value.param == "temperature"


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None


def test_tokens_have_the_best_alternatives_in_their_order():
    row = {9: Logprob(-5.0, 17), 4: Logprob(-1.0, 2), 3: Logprob(-0.5, 1)}
    assert list(tokens_of(Completion([9], [row]), 2)) == [SampledToken(9, -5.0, ((3, -0.5), (4, -1.0)))]
    assert list(tokens_of(Completion([9], [row]), 0)) == [SampledToken(9, -5.0, ())]
    assert list(tokens_of(Completion([9, 4]), None)) == [SampledToken(9), SampledToken(4)]
