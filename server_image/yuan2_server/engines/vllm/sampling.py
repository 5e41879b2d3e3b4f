"""Requests in vLLM's words, and its tokens in ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from yuan2_server.protocol import ErrorCode, RequestError
from yuan2_server.sequence import SampledToken, SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this take the most likely token, as with the built-in engine (FastChat's limit)."""
LOWEST_TEMPERATURE = 0.01
"""vLLM silently raises lower ones to this."""


def check(params: SamplingParams) -> None:
    """Raises RequestError for what vLLM would not honour."""
    if GREEDY_BELOW <= params.temperature < LOWEST_TEMPERATURE:
        raise RequestError(
            ErrorCode.PARAM_OUT_OF_RANGE,
            f"temperature: {params.temperature} is less than {LOWEST_TEMPERATURE}, the lowest that vLLM has; "
            "0 takes the most likely token",
            "temperature",
        )


def settings(params: SamplingParams, rows: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for a model with so many `rows` of logits.

    The text is made and compared with stop strings by us, so vLLM is asked for tokens only; `<eod>` is one of
    the stop tokens and not the tokenizer's business. Stop tokens that the model does not have (FastChat's
    programs send those of another Yuan) stop nothing.
    """
    greedy = params.temperature < GREEDY_BELOW or params.top_k == 1 or params.top_p == 0
    return {
        "temperature": 0.0 if greedy else params.temperature,
        "top_p": 1.0 if greedy else params.top_p,
        "top_k": 0 if greedy else params.top_k,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "max_tokens": params.max_new_tokens,
        # vLLM takes 64 bits; OpenAI's seed is any integer.
        "seed": None if params.seed is None else params.seed % 2**63,
        "logprobs": params.logprobs,
        "stop_token_ids": sorted(token for token in params.stop_token_ids if 0 <= token < rows),
        "ignore_eos": True,
        "detokenize": False,
    }


def tokens_of(completion: Any, alternatives: int | None) -> Iterator[SampledToken]:
    """The tokens of a piece of an answer (vLLM's `CompletionOutput`), each with the `alternatives` best."""
    if alternatives is None:
        yield from map(SampledToken, completion.token_ids)
        return
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        yield SampledToken(token, row[token].logprob, best(row, alternatives))


def best(row: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely of a row (token id to vLLM's `Logprob`), best first; a row has the chosen token
    beside them."""
    ranked = sorted(row.items(), key=lambda item: item[1].rank)
    return tuple((token, found.logprob) for token, found in ranked if found.rank <= count)[:count]
