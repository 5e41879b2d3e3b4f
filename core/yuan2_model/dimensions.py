"""The shape of a Yuan 2.0 model, read from its config.json. No torch: preflight checks import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from yuan2_model.errors import ModelFilesError

MODEL_TYPE = "yuan"
FILTER_TAPS = 2
"""Width of each of the two causal convolutions of the localized filter (arXiv 2311.15786)."""
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""A buffer that older checkpoints carry; the angles are computed from the head size instead."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dimensions:
    """Everything that decides the names and shapes of the tensors."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    eod_token: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Trainable numbers; a tied lm_head counts once."""
        total = sum(prod(shape) for shape in tensor_shapes(self).values())
        return total - (self.vocab_size * self.hidden_size if self.tie_word_embeddings else 0)


def read_dimensions(config: Mapping[str, Any], source: str = "config.json") -> Dimensions:
    """Check the fields of a published config.json and return the model's dimensions.

    Args:
        config: the parsed document.
        source: the file's name as it stands in an error.

    Raises:
        ModelFilesError: a field is absent, has a wrong type or value, or asks for what Yuan 2.0 is not.
    """
    _require_published_choices(config, source)
    hidden = _positive(config, "hidden_size", source)
    dimensions = Dimensions(
        vocab_size=_positive(config, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size", source),
        num_hidden_layers=_positive(config, "num_hidden_layers", source),
        num_attention_heads=_positive(config, "num_attention_heads", source),
        max_position_embeddings=_max_positions(config, source),
        eod_token=_token(config, "eod_token", source),
        tie_word_embeddings=_flag(config, "tie_word_embeddings", True, source),
    )
    _require_consistent(dimensions, source)
    return dimensions


def tensor_shapes(dimensions: Dimensions) -> dict[str, Shape]:
    """Names and shapes of the published tensors, `lm_head.weight` included, in the order of their use."""
    hidden, vocab = dimensions.hidden_size, dimensions.vocab_size
    shapes: dict[str, Shape] = {EMBEDDING: (vocab, hidden)}
    layer = _layer_shapes(hidden, dimensions.intermediate_size)
    for index in range(dimensions.num_hidden_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    shapes[HEAD] = (vocab, hidden)
    return shapes


def _layer_shapes(hidden: int, intermediate: int) -> dict[str, Shape]:
    half = hidden // 2
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.lf_gate.conv1.weight": (half, hidden, FILTER_TAPS, 1),
        "self_attn.lf_gate.conv1.bias": (half,),
        "self_attn.lf_gate.conv2.weight": (hidden, half, FILTER_TAPS, 1),
        "self_attn.lf_gate.conv2.bias": (hidden,),
        "self_attn.lf_gate.output_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def _require_published_choices(config: Mapping[str, Any], source: str) -> None:
    """Refuse fields that would change the mathematics: there is one Yuan 2.0."""
    for name, expected in (("model_type", MODEL_TYPE), ("hidden_act", "silu"), ("causal_mask", True)):
        found = config.get(name, None if name == "model_type" else expected)
        if found != expected:
            raise ModelFilesError(
                f"{source}: {name} is {found!r}, but Yuan 2.0 has {expected!r}; use a Yuan 2.0 model"
            )


def _positive(config: Mapping[str, Any], name: str, source: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelFilesError(f"{source}: {name} must be a positive integer, found {value!r}")
    return value


def _token(config: Mapping[str, Any], name: str, source: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelFilesError(f"{source}: {name} must be a token id, found {value!r}")
    return value


def _flag(config: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ModelFilesError(f"{source}: {name} must be true or false, found {value!r}")
    return value


def _max_positions(config: Mapping[str, Any], source: str) -> int:
    """`max_position_embeddings`, or `model_max_length` where only that one is given."""
    name = "model_max_length" if config.get("max_position_embeddings") is None else "max_position_embeddings"
    return _positive(config, name, source)


def _require_consistent(dimensions: Dimensions, source: str) -> None:
    hidden, heads = dimensions.hidden_size, dimensions.num_attention_heads
    if hidden % heads or dimensions.head_dim % 2:
        raise ModelFilesError(
            f"{source}: hidden_size {hidden} over num_attention_heads {heads} must give an even head size"
        )
    if dimensions.eod_token >= dimensions.vocab_size:
        raise ModelFilesError(
            f"{source}: eod_token {dimensions.eod_token} lies outside vocab_size {dimensions.vocab_size}"
        )
