"""vLLM in the test's own process: one start for many engines, and steps that a test can take one by one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/bin/python"
LENGTH = 16
"""Tokens of an answer."""
TOLERANCE = 1e-4
"""Of log-probabilities in fp32."""
_KEPT: list[Any] = []


def reference(*requests: tuple[str, Mapping[str, Any]]) -> list[Any]:
    """Ask `tests.vllm.reference`, our own model in its own environment."""
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.vllm.reference"],
        input=json.dumps(requests),
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its ids and the log-probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def same_as(self, other: Answer) -> bool:
        """Token for token, and log-probabilities within `TOLERANCE`."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return self.ids == other.ids and all(abs(mine - theirs) <= TOLERANCE for mine, theirs in pairs)


@dataclass(frozen=True, repr=False)
class Tiny:
    """A tiny model's directory, prompts, and what our own model answers to them."""

    directory: Path
    tokens: int
    prompts: list[list[int]]
    answers: list[Answer]


def draw_prompts(tokens: int) -> list[list[int]]:
    """Prompts of 1 to 300 tokens around the borders of blocks and chunks; four share a beginning of 150."""
    random = Random(5)
    first = tokens - 120  # past bytes and special tokens
    draw = lambda length: [random.randrange(first, tokens) for _ in range(length)]  # noqa: E731
    start = draw(150)
    return [
        *map(draw, (1, 2, 3, 17, 31, 32, 33, 64, 65, 96, 128, 200, 300)),
        *(start + draw(n) for n in (1, 9, 10, 42)),
    ]


def read_answers(found: list[dict[str, Any]]) -> list[Answer]:
    """Answers as the reference writes them."""
    return [Answer(tuple(item["ids"]), tuple(item["logprobs"])) for item in found]


def engine(directory: Path, **options: Any) -> Any:
    """An `LLM` in fp32 with a small cache."""
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 400,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 32 << 20,
        "enable_prefix_caching": False,
    }
    llm = LLM(str(directory), **settings | options)
    # Kept until the process ends: an engine that goes takes the process's communication groups along.
    _KEPT.append(llm)
    return llm


def greedy(length: int = LENGTH) -> Any:
    """Greedy answers of a fixed length, with log-probabilities."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)


def batch(llm: Any, prompts: Sequence[list[int]], adapters: Sequence[Any] | None = None) -> list[Answer]:
    """All prompts at once."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, greedy(), use_tqdm=False, lora_request=adapters)
    return [read(output) for output in outputs]


def read(output: Any) -> Answer:
    """vLLM's finished request as an answer."""
    completion = output.outputs[0]
    scores = [
        step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    return Answer(tuple(completion.token_ids), tuple(scores))


def staged(
    llm: Any,
    arrivals: Mapping[int, Sequence[int]],
    prompts: Sequence[list[int]],
    cancelled: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, Answer]:
    """Requests that arrive, and are cancelled, before given steps. Answers of those that were not cancelled.

    Args:
        llm: an engine in this process.
        arrivals: step to prompts that arrive before it.
        prompts: all prompts.
        cancelled: step to prompts that are cancelled before it.
    """
    core, done = llm.llm_engine, {}
    step, last = 0, max((*arrivals, *(cancelled or {})))
    while step <= last or core.has_unfinished_requests():
        core.abort_request([str(index) for index in (cancelled or {}).get(step, ())])
        for index in arrivals.get(step, ()):
            core.add_request(str(index), {"prompt_token_ids": prompts[index]}, greedy())
        for output in core.step() if core.has_unfinished_requests() else ():
            if output.finished and output.outputs[0].finish_reason != "abort":
                done[int(output.request_id)] = read(output)
        step += 1
    return done


def wrong(found: Mapping[int, Answer] | Sequence[Answer], expected: Sequence[Answer]) -> list[int]:
    """Places whose answers are not the expected ones."""
    items = found.items() if isinstance(found, Mapping) else enumerate(found)
    return [index for index, answer in items if not answer.same_as(expected[index])]
