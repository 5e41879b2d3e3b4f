"""Two processes that share the model, on CPU: tensor parallel, with adapters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.engines import Tiny, batch, engine, wrong
from tests.vllm.test_lora import RANKS, Adapters, make_adapters


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return make_adapters(tiny, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny) -> Any:
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": True}
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64}
    return engine(tiny.directory, distributed_executor_backend="mp", **options, **lora)


def test_two_ranks_answer_as_one(tiny: Tiny, two_ranks: Any) -> None:
    assert not wrong(batch(two_ranks, tiny.prompts), tiny.answers)
    assert not wrong(batch(two_ranks, tiny.prompts), tiny.answers)  # prefixes are cached now


@pytest.mark.parametrize("name", RANKS)
def test_an_adapter_of_all_seven_projections_over_two_ranks(
    name: str, tiny: Tiny, adapters: Adapters, two_ranks: Any
) -> None:
    """`o_proj` included: its input comes in the order of the ranks' heads."""
    found = batch(two_ranks, tiny.prompts, adapters.requests([name] * len(tiny.prompts)))
    assert not wrong(found, adapters.answers[name])


def test_base_and_adapters_in_one_batch_over_two_ranks(
    tiny: Tiny, adapters: Adapters, two_ranks: Any
) -> None:
    names = [("base", "eight", "sixty-four")[place % 3] for place in range(len(tiny.prompts))]
    found = batch(two_ranks, tiny.prompts, adapters.requests(names))
    assert not wrong(found, [adapters.answers[name][place] for place, name in enumerate(names)])
