"""The choice of a token: greedy, nucleus, penalties, seeds, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tests.unit.server.test_scheduler import Sink
from yuan2_server.engines.builtin.sampler import FIRST_CANDIDATES, Sampler, penalise
from yuan2_server.sequence import SamplingParams, Sequence

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params) -> Sequence:
    return Sequence(prompt, SamplingParams(max_new_tokens=10, **params), Sink(), output_ids=list(output))


def shares(logits: torch.Tensor, draws: int = 4000, **params) -> dict[int, float]:
    """How often each token is drawn."""
    sampler, one = Sampler(len(logits)), sequence(seed=1, **params)
    counts = Counter(sampler.sample(logits, one).token_id for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


def test_temperature_zero_takes_the_best():
    assert shares(LOGITS, 20, temperature=0) == {1: 1.0}
    assert shares(LOGITS, 20, temperature=1e-6) == {1: 1.0}
    assert shares(LOGITS, 20, top_p=0.0) == {1: 1.0}
    assert shares(LOGITS, 20, top_k=1) == {1: 1.0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_probabilities(temperature: float):
    expected = torch.softmax(LOGITS / temperature, 0)
    drawn = shares(LOGITS, temperature=temperature)
    for token, probability in enumerate(expected.tolist()):
        assert drawn.get(token, 0) == pytest.approx(probability, abs=0.03)


def test_the_nucleus_is_the_smallest_set_of_that_mass():
    # softmax of LOGITS: 0.09, 0.66, 0.24, 0.01
    assert set(shares(LOGITS, 500, top_p=0.6)) == {1}
    assert set(shares(LOGITS, 500, top_p=0.7)) == {1, 2}
    assert set(shares(LOGITS, 2000, top_p=0.95)) == {0, 1, 2}


def test_top_k_is_applied_before_top_p():
    assert set(shares(LOGITS, 500, top_k=2)) == {1, 2}
    # Among the two best, the first has 0.73 of the mass.
    assert set(shares(LOGITS, 500, top_k=2, top_p=0.7)) == {1}


def test_a_nucleus_wider_than_the_first_candidates_is_whole():
    flat = torch.zeros(3 * FIRST_CANDIDATES)
    drawn = shares(flat, 3000, top_p=0.9)
    assert len(drawn) > FIRST_CANDIDATES


def test_rows_without_a_token_are_never_chosen():
    logits = torch.tensor([0.0, 1.0, 50.0])
    assert Sampler(2).sample(logits, sequence(temperature=0)).token_id == 1


def test_the_repetition_penalty_lowers_what_prompt_and_answer_have_said():
    one = sequence(prompt=(1, 1), output=(3,), repetition_penalty=2.0)
    assert penalise(LOGITS, one).tolist() == [1.0, 1.5, 2.0, -2.0]


def test_presence_and_frequency_penalties_count_only_the_answer():
    one = sequence(prompt=(0,), output=(1, 1, 2), presence_penalty=0.5, frequency_penalty=0.25)
    assert penalise(LOGITS, one).tolist() == [1.0, 3.0 - 0.5 - 0.5, 2.0 - 0.5 - 0.25, -1.0]


def test_a_seed_repeats_a_sequence_whatever_others_draw():
    def draws(noise: bool) -> list[int]:
        sampler, one, other = Sampler(4), sequence(seed=-5), sequence(seed=6)
        result = []
        for _ in range(20):
            result.append(sampler.sample(LOGITS, one).token_id)
            if noise:
                sampler.sample(LOGITS, other)
                torch.rand(3)
        return result

    assert draws(noise=False) == draws(noise=True)


def test_logprobs_are_those_of_the_model_before_temperature_and_penalties():
    one = sequence(output=(1,), temperature=0, frequency_penalty=2.0, logprobs=2)
    token = Sampler(4).sample(LOGITS, one)
    expected = torch.log_softmax(LOGITS, 0)
    assert token.token_id == 2
    assert token.logprob == pytest.approx(float(expected[2]))
    assert [index for index, _ in token.top] == [1, 2]
    assert math.exp(token.top[0][1]) == pytest.approx(float(expected[1].exp()))
    assert Sampler(4).sample(LOGITS, sequence(temperature=0, logprobs=0)).top == ()
