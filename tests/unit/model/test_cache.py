"""The cache's own operations, and what `forward` does with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yuan2_model import Yuan2Cache, Yuan2ForCausalLM

pytestmark = pytest.mark.numbers


@torch.no_grad()
def test_selected_rows_go_on_as_they_would_have(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = torch.stack([sequences[0], sequences[2][:9], sequences[2][5:14]])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    rows = torch.tensor([2, 0, 2])
    tail = torch.tensor([[4], [5], [6]])
    found = model(input_ids=tail, past_key_values=cache.select(rows)).logits
    wanted = model(input_ids=torch.cat((ids[rows], tail), dim=1)).logits[:, -1:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_selection_leaves_the_original_untouched(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[2][None]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    branch = cache.select(torch.tensor([0]))
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=branch)
    assert (cache.get_seq_length(), branch.get_seq_length()) == (5, 8)
    found = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, 5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_buffers_grow_without_losing_anything(model: Yuan2ForCausalLM) -> None:
    ids = torch.arange(200)[None] % 90
    cache = Yuan2Cache(model.config.num_hidden_layers)
    logits = [
        model(input_ids=part, past_key_values=cache).logits
        for part in ids.split([1, 60, 1, 1, 1, 100, 36], 1)
    ]
    torch.testing.assert_close(torch.cat(logits, 1), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_a_cache(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[2][None]
    model(input_ids=ids).logits[:, -1].sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache, logits = None, None
    for part in ids.split([6, 1, 7], dim=1):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits
    assert logits is not None
    logits[:, -1].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-4, rtol=1e-4, msg=name)


def test_training_keeps_no_cache_unless_asked(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids = sequences[0][None]
    assert model.train()(input_ids=ids).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values is not None
    assert model.eval()(input_ids=ids).past_key_values is not None
    assert model(input_ids=ids, use_cache=False).past_key_values is None


def test_a_cache_of_another_kind_is_refused(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    with pytest.raises(TypeError, match="must be a Yuan2Cache, found tuple"):
        model(input_ids=sequences[0][None], past_key_values=((None, None),))


def test_checkpointing_with_a_cache_is_refused(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model.train()(input_ids=sequences[0][None], use_cache=True)


def test_sequence_length_of_a_layer_that_is_not_there(model: Yuan2ForCausalLM) -> None:
    with pytest.raises(IndexError, match="layer 2 of a cache with 2 layers"):
        Yuan2Cache(2).get_seq_length(2)
