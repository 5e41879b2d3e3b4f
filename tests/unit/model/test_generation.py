"""`transformers.generate` on our model and cache equals the plain argmax loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yuan2_model import Yuan2Cache, Yuan2ForCausalLM
from yuan2_model.outputs import CACHE_NAME

pytestmark = pytest.mark.numbers

NEW = 12


@torch.no_grad()
def argmax_loop(model: Yuan2ForCausalLM, ids: Tensor, steps: int = NEW) -> Tensor:
    """Greedy continuation without a cache, stopped after `<eod>`; [1, T + steps at most]."""
    for _ in range(steps):
        ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
        if int(ids[0, -1]) == model.config.eos_token_id:
            break
    return ids


def left_padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), 90)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = sequence, 1
    return ids, mask


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_argmax_loop(
    model: Yuan2ForCausalLM, sequences: list[Tensor], use_cache: bool
) -> None:
    for sequence in sequences:
        ids = sequence[None]
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=use_cache
        )
        assert found.tolist() == argmax_loop(model, ids).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_reads_every_token_once(
    model: Yuan2ForCausalLM, sequences: list[Tensor], beams: int
) -> None:
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _module, _args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = sequences[0][None]
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        num_beams=beams,
        do_sample=False,
    )
    handle.remove()
    assert read == [ids.shape[1], 1, 1, 1]


def test_left_padded_batch_generates_what_single_prompts_do(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids, mask = left_padded(sequences)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, sequence in enumerate(sequences):
        answer = argmax_loop(model, sequence[None])[0, len(sequence) :].tolist()
        rest = found[row, ids.shape[1] :].tolist()
        assert rest[: len(answer)] == answer
        assert all(token == model.config.pad_token_id for token in rest[len(answer) :])


def test_beam_search_with_the_cache_equals_beam_search_without(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids, mask = left_padded(sequences)
    with_cache, without = (
        model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=cached
        )
        for cached in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_generation_from_embeddings_equals_generation_from_ids(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids = sequences[0][None]
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )
    assert found.tolist() == argmax_loop(model, ids)[:, ids.shape[1] :].tolist()


def test_generation_goes_on_from_a_cache(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[0][None]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-2], use_cache=True).past_key_values
    assert isinstance(cache, Yuan2Cache)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_NAME: cache},
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert found.tolist() == argmax_loop(model, ids).tolist()


def test_sampling_is_repeatable_by_seed(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[0][None]
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=True)
        )
    assert runs[0].tolist() == runs[1].tolist()


def test_unknown_model_arguments_are_refused(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="token_type_ids"):
        model.generate(sequences[0][None], token_type_ids=sequences[0][None], max_new_tokens=1)
