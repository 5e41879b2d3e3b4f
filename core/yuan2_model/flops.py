"""FLOPs of a training step from a model's dimensions. No torch, pure.

A matrix product of [m, k] and [k, n] takes 2 m k n. Counted is what the mathematics asks for, once: neither
padding nor what gradient checkpointing computes again, so that FLOPs over time and peak rate are a model
FLOPs utilisation (arXiv 2204.02311, appendix B). Element-wise work (norms, rotations, softmax, the
optimizer) is not counted: it is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from yuan2_model.dimensions import EMBEDDING, HEAD, Dimensions, tensor_shapes


def causal_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs of causal attention in sequences that each see only themselves."""
    return sum(length * (length + 1) // 2 for length in lengths)


def learned_only(name: str, layers: int) -> bool:
    """Whether a matrix of a model of so many layers is multiplied with labelled tokens alone.

    So are the output layer and, of the last layer, all that is behind attention: no other token needs it.
    """
    last = f"model.layers.{layers - 1}."
    return name.startswith((f"{last}self_attn.o_proj.", f"{last}mlp.", HEAD))


def multiplied(dimensions: Dimensions, tokens: int, labelled: int) -> int:
    """Products of a weight and a token's channel in a forward pass with its loss.

    The localized filter's convolutions count as what they are: two taps of half the channels each way, a
    matrix of `hidden` x `hidden` a convolution.
    """
    return sum(
        prod(shape) * (labelled if learned_only(name, dimensions.num_hidden_layers) else tokens)
        for name, shape in tensor_shapes(dimensions).items()
        if len(shape) > 1 and name != EMBEDDING
    )


def forward_flops(dimensions: Dimensions, tokens: int, pairs: int, labelled: int) -> int:
    """FLOPs of a forward pass with its loss; arguments as of `model_flops`."""
    return 2 * multiplied(dimensions, tokens, labelled) + _attention(dimensions, pairs)


def model_flops(
    dimensions: Dimensions, tokens: int, pairs: int, labelled: int, adapter: int | None = None
) -> int:
    """FLOPs of the forward and backward pass of a batch.

    Args:
        dimensions: the model's.
        tokens: tokens, labelled or not, padding not counted.
        pairs: (query, key) pairs that attention looks at, see `causal_pairs`.
        labelled: tokens with a label; the output layer and what is behind the last attention multiply no
            others.
        adapter: None when all weights are trained; else they are frozen, so that the products that make
            their gradients are not asked for, and this is the number of weights in the low-rank matrices
            beside them (taken to multiply all tokens: the last layer's are too few to tell).
    """
    # Products of one size: forward, gradient of the inputs and, where weights are trained, of the weights.
    products = 3 if adapter is None else 2
    weights = multiplied(dimensions, tokens, labelled)
    # Both sides of attention's products are activations: three products of each size in any case.
    attention = 3 * _attention(dimensions, pairs)
    return 2 * products * weights + attention + 2 * 3 * (adapter or 0) * tokens


def _attention(dimensions: Dimensions, pairs: int) -> int:
    """Scores and weighted values: 2 hidden each, a pair and a layer."""
    return 4 * dimensions.hidden_size * dimensions.num_hidden_layers * pairs
