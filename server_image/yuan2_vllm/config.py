"""config.json of Yuan 2.0 as transformers 5 reads it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from yuan2_vllm.tokenizer import Yuan2Tokenizer

SMALLEST_HEAD = 32
"""vLLM's attention on CPU has no narrower head; narrower ones (tiny models) are padded with zeros."""


class Yuan2Config(PretrainedConfig):
    """The published fields that the model and vLLM read; any other one is kept as it is.

    Raises:
        ValueError: a field describes something that is not Yuan 2.0; one line that names it.
    """

    model_type = "yuan"

    def __init__(
        self,
        vocab_size: int = 135040,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 32,
        max_position_embeddings: int | None = None,
        model_max_length: int | None = None,
        rms_norm_eps: float = 1e-6,
        hidden_act: str = "silu",
        causal_mask: bool = True,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"config.json: hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_attention_heads}"
            )
        if hidden_act != "silu" or not causal_mask:
            raise ValueError(
                f"config.json: hidden_act {hidden_act!r}, causal_mask {causal_mask}: "
                "Yuan 2.0 has silu and True"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = self.num_key_value_heads = num_attention_heads
        self.head_dim = max(SMALLEST_HEAD, hidden_size // num_attention_heads)
        self.max_position_embeddings = max_position_embeddings or model_max_length or 8192
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        others.pop("auto_map", None)  # no remote code
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


def register_config() -> None:
    """Make `AutoConfig` and `AutoTokenizer` know the model type; safe to call twice."""
    AutoConfig.register(Yuan2Config.model_type, Yuan2Config, exist_ok=True)
    AutoTokenizer.register(Yuan2Config, tokenizer_class=Yuan2Tokenizer, exist_ok=True)
