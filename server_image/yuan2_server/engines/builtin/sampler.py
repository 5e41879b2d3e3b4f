"""From logits to the next token. Tensor suffixes: V vocabulary, K candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from yuan2_server.sequence import Entry, SampledToken, SamplingParams, Sequence

GREEDY_BELOW = 1e-5
"""Temperatures below this take the most likely token (FastChat's limit)."""
FIRST_CANDIDATES = 1024
"""Nuclei are nearly always smaller than this, and finding these is far cheaper than sorting the whole
vocabulary."""


class Sampler:
    """Chooses tokens for many sequences; one with a seed has a random stream of its own.

    The model's embedding has more rows than the tokenizer has pieces; the rows at `vocab_size` and beyond
    have no text and are never chosen.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits_V: Tensor, sequence: Sequence) -> SampledToken:
        """The next token of `sequence`, from the logits at its last position (any float type)."""
        params = sequence.params
        raw_V = logits_V[: self.vocab_size].float()
        scores_V = penalise(raw_V, sequence)
        token_id = choose(scores_V, params, self._generator(sequence, raw_V.device))
        if params.logprobs is None:
            return SampledToken(token_id)
        return _with_logprobs(raw_V, token_id, params.logprobs)

    def forget(self, sequence: Entry) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._generators.pop(sequence.id, None)

    def _generator(self, sequence: Sequence, device: torch.device) -> torch.Generator | None:
        if sequence.params.seed is None:
            return None
        if sequence.id not in self._generators:
            generator = torch.Generator(device=device)
            # torch takes 64 bits; OpenAI's seed is any integer.
            self._generators[sequence.id] = generator.manual_seed(sequence.params.seed % 2**63)
        return self._generators[sequence.id]


def penalise(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Lower the scores of tokens seen before.

    `repetition_penalty` divides positive and multiplies negative scores of tokens in prompt or answer (CTRL,
    arXiv 1909.05858); `presence_penalty` and `frequency_penalty` subtract from tokens of the answer (OpenAI's
    formula).
    """
    params = sequence.params
    scores_V = logits_V
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), device=logits_V.device)
        seen = seen[seen < logits_V.shape[0]]
        values = logits_V[seen]
        values = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        scores_V = scores_V.scatter(0, seen, values)
    if sequence.output_ids and (params.presence_penalty or params.frequency_penalty):
        output = torch.tensor(sequence.output_ids, device=logits_V.device)
        counts_V = torch.bincount(output, minlength=logits_V.shape[0])
        scores_V = scores_V - params.frequency_penalty * counts_V - params.presence_penalty * (counts_V > 0)
    return scores_V


def choose(scores_V: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Draw a token id from the scores, cut down to the `top_k` best and the smallest nucleus of mass
    `top_p`."""
    if params.temperature < GREEDY_BELOW or params.top_k == 1 or params.top_p == 0:
        return int(scores_V.argmax())
    probs_V = torch.softmax(scores_V / params.temperature, dim=-1)
    if params.top_k == 0 and params.top_p == 1:
        return int(torch.multinomial(probs_V, 1, generator=generator))
    probs_K, ids_K = _nucleus(probs_V, params.top_k or probs_V.shape[0], params.top_p)
    return int(ids_K[torch.multinomial(probs_K, 1, generator=generator)])


def _nucleus(probs_V: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities (not normalised) and ids of the candidates, best first; top_k is applied before top_p."""
    size = min(top_k, probs_V.shape[0])
    probs_K, ids_K = probs_V.topk(min(size, FIRST_CANDIDATES))
    if probs_K.shape[0] < size and float(probs_K.sum()) < top_p:
        probs_K, ids_K = probs_V.topk(size)
    total = probs_K.sum() if top_k < probs_V.shape[0] else 1.0
    before_K = probs_K.cumsum(0) - probs_K
    keep = int((before_K < top_p * total).sum().clamp(min=1))
    return probs_K[:keep], ids_K[:keep]


def _with_logprobs(logits_V: Tensor, token_id: int, alternatives: int) -> SampledToken:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    values, ids = logprobs_V.topk(min(alternatives, logprobs_V.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist()))  # noqa: B905 -- same length by construction
    return SampledToken(token_id, float(logprobs_V[token_id]), top)
