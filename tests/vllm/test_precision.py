"""bf16: vLLM's log-probabilities are no farther from fp32 than those of our own model in bf16."""

from __future__ import annotations

from tests.vllm.engines import Tiny, engine, reference

ALLOWANCE = 1.5
"""Both errors are means over some hundred roundings of the same size; which way each goes is chance."""


def test_bf16_is_no_farther_from_fp32_than_our_own(tiny: Tiny) -> None:
    """On the same texts: each prompt with its fp32 answer, scored token by token."""
    texts = [prompt + list(answer.ids) for prompt, answer in zip(tiny.prompts, tiny.answers, strict=True)]
    common = {"model": str(tiny.directory), "texts": texts, "tokens": tiny.tokens}
    exact, ours = reference(
        ("score", common | {"dtype": "float32"}), ("score", common | {"dtype": "bfloat16"})
    )
    llm = engine(tiny.directory, dtype="bfloat16")
    theirs = [scores(output, text) for output, text in zip(ask(llm, texts), texts, strict=True)]
    mine, its = mean_error(ours, exact), mean_error(theirs, exact)
    assert 0 < its <= ALLOWANCE * mine


def ask(llm: object, texts: list[list[int]]) -> list[object]:
    from vllm import SamplingParams

    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    given = [{"prompt_token_ids": text} for text in texts]
    return llm.generate(given, scoring, use_tqdm=False)  # type: ignore[attr-defined]


def scores(output: object, text: list[int]) -> list[float]:
    """Of each token but the first, given those before it."""
    rows = output.prompt_logprobs  # type: ignore[attr-defined]
    return [row[token].logprob for row, token in zip(rows[1:], text[1:], strict=True)]


def mean_error(found: list[list[float]], exact: list[list[float]]) -> float:
    errors = [
        abs(x - y) for mine, right in zip(found, exact, strict=True) for x, y in zip(mine, right, strict=True)
    ]
    return sum(errors) / len(errors)
