"""FLOPs of a training step from a model's dimensions. No torch, pure.

A matrix product of [m, k] and [k, n] takes 2 m k n. Counted is what the mathematics asks for, once: neither
padding nor what gradient checkpointing computes again, so that FLOPs over time and peak rate are a model
FLOPs utilisation (arXiv 2204.02311, appendix B). Element-wise work (norms, rotations, softmax, the
optimizer) is not counted: it is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from yuan2_model.dimensions import Dimensions, tensor_shapes


def causal_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs of causal attention in sequences that each see only themselves."""
    return sum(length * (length + 1) // 2 for length in lengths)


def layer_weights(dimensions: Dimensions) -> int:
    """Weights of all layers that every token is multiplied with.

    The localized filter's convolutions are among them: two taps of half the channels each way, a matrix of
    `hidden` x `hidden` a convolution.
    """
    return sum(
        prod(shape)
        for name, shape in tensor_shapes(dimensions).items()
        if name.startswith("model.layers.") and len(shape) > 1
    )


def forward_flops(dimensions: Dimensions, tokens: int, pairs: int, labelled: int) -> int:
    """FLOPs of a forward pass with its loss; arguments as of `model_flops`."""
    weights = layer_weights(dimensions) * tokens + _head(dimensions) * labelled
    return 2 * weights + _attention(dimensions, pairs)


def model_flops(
    dimensions: Dimensions, tokens: int, pairs: int, labelled: int, adapter: int | None = None
) -> int:
    """FLOPs of the forward and backward pass of a batch.

    Args:
        dimensions: the model's.
        tokens: tokens, labelled or not, padding not counted.
        pairs: (query, key) pairs that attention looks at, see `causal_pairs`.
        labelled: tokens with a label; the output layer multiplies no others.
        adapter: None when all weights are trained; else they are frozen, so that the products that make
            their gradients are not asked for, and this is the number of weights in the low-rank matrices
            beside them.
    """
    # Products of one size: forward, gradient of the inputs and, where weights are trained, of the weights.
    products = 3 if adapter is None else 2
    weights = layer_weights(dimensions) * tokens + _head(dimensions) * labelled
    # Both sides of attention's products are activations: three products of each size in any case.
    attention = 3 * _attention(dimensions, pairs)
    return 2 * products * weights + attention + 2 * 3 * (adapter or 0) * tokens


def _head(dimensions: Dimensions) -> int:
    return dimensions.vocab_size * dimensions.hidden_size


def _attention(dimensions: Dimensions, pairs: int) -> int:
    """Scores and weighted values: 2 hidden each, a pair and a layer."""
    return 4 * dimensions.hidden_size * dimensions.num_hidden_layers * pairs
