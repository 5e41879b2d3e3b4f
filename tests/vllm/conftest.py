"""Tests of `yuan2_vllm` in a real vLLM on CPU: `make vllm` runs them with `.venv-vllm`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.vllm.engines import LENGTH, Tiny, draw_prompts, read_answers, reference

os.environ |= {
    "OMP_NUM_THREADS": "1",  # threads that wait for each other on shared cores cost more than they give
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in the test's own process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # tests share the cores
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # eager means eager: the sampler, too, would be compiled for each engine
}

logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # a failure would show thousands of its lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn about themselves."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model with more embedding rows than tokens, and our own model's answers."""
    from yuan2_core.tokenizer import Yuan2Tokenizer

    directory = tmp_path_factory.mktemp("tiny")
    reference(("make", {"directory": str(directory)}))
    tokens = Yuan2Tokenizer.from_pretrained(directory).vocab_size
    prompts = draw_prompts(tokens)
    request = {"model": str(directory), "prompts": prompts, "length": LENGTH, "tokens": tokens}
    return Tiny(directory, tokens, prompts, read_answers(reference(("answer", request))[0]))
