"""`Yuan2ForCausalLM` as vLLM asks for it: layers, cache shapes, names for loading and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA
from vllm.model_executor.models.utils import maybe_prefix
from vllm.tokenizers import cached_tokenizer_from_config

from yuan2_vllm import internals
from yuan2_vllm.filter import state_shapes
from yuan2_vllm.layers import Yuan2DecoderLayer

PACKED = {"qk_proj": ["q_proj", "k_proj"], "v_proj": ["v_proj"], "up_gate_proj": ["up_proj", "gate_proj"]}
"""Layers made of several published ones, in order. One missing here would lose its LoRA with a warning."""

_HOMES = {
    part: (packed, index)
    for packed, parts in PACKED.items()
    if len(parts) > 1
    for index, part in enumerate(parts)
}
"""Published layer to the layer that it is a part of, and its place there."""


# Dynamic dimensions are named: the decorator cannot read annotations that are strings.
@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class Yuan2Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Yuan2DecoderLayer(vllm_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [T, H]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        output: Tensor
        output, _ = self.norm(x, residual)
        return output


class Yuan2ForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA):
    """A hybrid model in vLLM's sense: every layer has an attention cache and the filter's state.

    Pipeline parallelism is not declared (`SupportsPP`), so vLLM rejects it: no test of it passes on CPU yet.
    """

    packed_modules_mapping = PACKED

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (vllm_config.model_config.dtype,) * 2

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_shapes(vllm_config.model_config.hf_config.hidden_size, ranks)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable[..., Any], ...]:
        return get_temporal_copy_spec, get_temporal_copy_spec

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build this rank's part, without weights.

        Raises:
            ValueError: a setting that Yuan 2.0 cannot be served with; one line that names it.
        """
        super().__init__()
        _check(vllm_config)
        if vllm_config.lora_config is not None:
            internals.install_lora()
        self.config = config = vllm_config.model_config.hf_config
        self.model = Yuan2Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.tokens = config.vocab_size if tokenizer is None else len(tokenizer)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,  # noqa: ARG002 - of pipeline stages
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        output: Tensor = self.model(input_ids, positions, inputs_embeds)
        return output

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, V], -inf in the rows beyond the tokenizer's tokens: they have no text and are never sampled."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits[:, self.tokens :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill this rank's parameters from tensors with published names; vLLM reports those that are missing.

        Raises:
            ValueError: a tensor that no Yuan 2.0 has; one line that names it.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            tied = name == "lm_head.weight" and self.config.tie_word_embeddings
            if tied or name.endswith("rotary_emb.inv_freq"):
                continue
            home, *part = _home(name)
            if home not in parameters:
                raise ValueError(f"{name}: no such tensor in the Yuan 2.0 that config.json describes")
            parameter = parameters[home]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *part)
            loaded.add(home)
        return loaded


def _home(name: str) -> tuple[str] | tuple[str, int]:
    """The parameter that a published tensor goes into and, if it is a part of it, which one."""
    *path, layer, kind = name.split(".")
    if layer not in _HOMES:
        return (name,)
    packed, index = _HOMES[layer]
    return ".".join((*path, packed, kind)), index


def _check(vllm_config: VllmConfig) -> None:
    """Refuse what would answer wrongly."""
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative_config: Yuan 2.0 cannot take back the localized filter's state when a drafted token "
            "is rejected; serve it without speculative decoding"
        )
    heads = vllm_config.model_config.hf_config.num_attention_heads
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if heads % (2 * ranks):
        raise ValueError(
            f"tensor_parallel_size {ranks}: each rank holds some of each half of the {heads} heads, "
            f"so it must divide {heads // 2}"
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.fully_sharded_loras:
        raise ValueError("fully_sharded_loras: not supported for Yuan 2.0; leave it out")
