"""FLOPs by formula beside those that torch counts, product by product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from yuan2_core.estimate import Run, Shape
from yuan2_core.estimate.duration import micro_batch_flops
from yuan2_core.presets import PRESETS
from yuan2_model import Yuan2ForCausalLM
from yuan2_model.dimensions import Dimensions, read_dimensions
from yuan2_model.flops import causal_pairs, forward_flops, model_flops

aten = torch.ops.aten
LABELLED = 17


def counted(model: Yuan2ForCausalLM, ids: Tensor, labels: Tensor, backward: bool) -> int:
    """FLOPs of products with weights; attention is counted elsewhere, for torch counts hidden pairs too."""

    def product(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
        # The gradient of a norm multiplies with a single column: a sum, not a layer.
        return 0 if b[1] == 1 else 2 * a[0] * a[1] * b[1]

    def added(_: object, a: torch.Size, b: torch.Size, *__: object, **___: object) -> int:
        return product(a, b)

    mapping = {aten.mm: product, aten.addmm_: added}
    with (
        torch.set_grad_enabled(backward),
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        loss = model(input_ids=ids, labels=labels, use_cache=False, return_logits=False).loss
        if backward:
            loss.backward()
    products = ("mm", "addmm", "addmm_")
    return sum(flops for op, flops in counter.flop_counts["Global"].items() if op.__name__ in products)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(40).reshape(2, 20) + 3
    labels = torch.full_like(ids, -100)
    labels[0, 3:] = ids[0, 3:]
    return ids, labels


@pytest.fixture
def dimensions(model: Yuan2ForCausalLM) -> Dimensions:
    return read_dimensions(model.config.to_dict())


def test_products_are_those_torch_counts(model: Yuan2ForCausalLM, dimensions: Dimensions) -> None:
    ids, labels = batch()
    assert counted(model, ids, labels, backward=True) == model_flops(dimensions, ids.numel(), 0, LABELLED)
    assert counted(model, ids, labels, backward=False) == forward_flops(dimensions, ids.numel(), 0, LABELLED)


def test_frozen_weights_need_no_gradient_of_their_own(
    model: Yuan2ForCausalLM, dimensions: Dimensions
) -> None:
    """Only the input of the first layer is trained: every product but those of the weights' gradients."""
    ids, labels = batch()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert counted(model, ids, labels, backward=True) == model_flops(
        dimensions, ids.numel(), 0, LABELLED, adapter=0
    )


def test_attention_counts_two_products_of_each_pair(dimensions: Dimensions) -> None:
    query_key = 2 * dimensions.head_dim * dimensions.num_attention_heads
    by_hand = dimensions.num_hidden_layers * 2 * query_key
    assert forward_flops(dimensions, 0, 1, 0) == by_hand
    assert model_flops(dimensions, 0, 1, 0) == 3 * by_hand
    assert model_flops(dimensions, 0, 1, 0, adapter=0) == 3 * by_hand


def test_an_adapter_weight_takes_three_products(dimensions: Dimensions) -> None:
    with_one = model_flops(dimensions, 5, 0, 0, adapter=1)
    assert with_one - model_flops(dimensions, 5, 0, 0, adapter=0) == 6 * 5


@given(st.lists(st.integers(0, 50), max_size=8))
def test_pairs_are_those_below_the_diagonal(lengths: list[int]) -> None:
    assert causal_pairs(lengths) == sum(torch.ones(n, n).tril().count_nonzero().item() for n in lengths)


@pytest.mark.parametrize("size", sorted(PRESETS))
def test_the_estimate_counts_alike(size: str) -> None:
    """The operator's estimate has the shape alone, and no norms, biases or diagonal of the scores."""
    preset = PRESETS[size]
    length = 1024
    run = Run(
        shape=Shape.of(preset),
        method="full",
        stage=2,
        length=length,
        micro_batch=2,
        accumulation=1,
        gpus_per_node=1,
        checkpointing=False,
    )
    dimensions = Dimensions(
        preset.vocab_size,
        preset.hidden_size,
        preset.intermediate_size,
        preset.num_hidden_layers,
        preset.num_attention_heads,
        length,
        0,
        True,
    )
    ours = model_flops(dimensions, 2 * length, causal_pairs([length] * 2), 2 * length)
    assert micro_batch_flops(run) == pytest.approx(ours, rel=1e-3)
    assert micro_batch_flops(replace(run, method="lora")) < ours
