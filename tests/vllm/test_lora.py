"""Adapters beside their base in one batch, against our own model with the adapter merged by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import LENGTH, Answer, Tiny, batch, engine, read_answers, reference, wrong

RANKS = {"eight": 8, "sixty-four": 64}


@dataclass(frozen=True, repr=False)
class Adapters:
    """Directories of adapters, and the tiny model's answers with each merged into it; `base` is without."""

    directories: dict[str, Path]
    answers: dict[str, list[Answer]]

    def requests(self, names: list[str]) -> list[Any]:
        """What to ask vLLM with, an entry a name."""
        from vllm.lora.request import LoRARequest

        numbers = {name: number for number, name in enumerate(self.directories, 1)}
        return [
            None if name == "base" else LoRARequest(name, numbers[name], str(self.directories[name]))
            for name in names
        ]


def make_adapters(tiny: Tiny, directory: Path) -> Adapters:
    """Random adapters on all seven projections."""
    directories = {name: directory / name for name in RANKS}
    common = {"model": str(tiny.directory), "prompts": tiny.prompts, "length": LENGTH, "tokens": tiny.tokens}
    made = [
        (
            "adapter",
            {"directory": str(path), "model": str(tiny.directory), "rank": RANKS[name], "seed": RANKS[name]},
        )
        for name, path in directories.items()
    ]
    asked = [("answer", common | {"adapter": str(path)}) for path in directories.values()]
    found = reference(*made, *asked)[len(made) :]
    answers = dict(zip(directories, map(read_answers, found), strict=True))
    return Adapters(directories, answers | {"base": tiny.answers})


@pytest.fixture(scope="session")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return make_adapters(tiny, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one slot", "two slots"])
def llm(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    slots = request.param
    return engine(tiny.directory, enable_lora=True, max_loras=slots, max_cpu_loras=2, max_lora_rank=64)


def test_adapters_change_the_answers(adapters: Adapters) -> None:
    """Else equality would prove little."""
    answers = adapters.answers
    for name in RANKS:
        assert len(wrong(answers[name], answers["base"])) == len(answers["base"])


@pytest.mark.parametrize("name", ["base", *RANKS])
def test_an_adapter_of_all_seven_projections(name: str, tiny: Tiny, adapters: Adapters, llm: Any) -> None:
    found = batch(llm, tiny.prompts, adapters.requests([name] * len(tiny.prompts)))
    assert not wrong(found, adapters.answers[name])


def test_base_and_adapters_in_one_batch(tiny: Tiny, adapters: Adapters, llm: Any) -> None:
    """Every slot is taken: vLLM's own CPU code gives the base's rows the last slot's adapter then."""
    names = [("base", "eight", "sixty-four")[place % 3] for place in range(len(tiny.prompts))]
    found = batch(llm, tiny.prompts, adapters.requests(names))
    assert not wrong(found, [adapters.answers[name][place] for place, name in enumerate(names)])


def test_adapters_loaded_and_dropped_while_requests_run(tiny: Tiny, adapters: Adapters, llm: Any) -> None:
    core = llm.llm_engine
    first, second = adapters.requests(["eight", "sixty-four"])
    for request in (first, second, first):
        assert core.add_lora(request)
        assert request.lora_int_id in core.list_loras()
        half = batch(llm, tiny.prompts[:6], [request, None] * 3)
        assert not wrong(
            half, [adapters.answers[(request.lora_name, "base")[place % 2]][place] for place in range(6)]
        )
        assert core.remove_lora(request.lora_int_id)
        assert request.lora_int_id not in core.list_loras()
        assert not wrong(batch(llm, tiny.prompts[:3]), tiny.answers)
