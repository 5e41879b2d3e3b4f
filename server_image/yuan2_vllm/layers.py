"""A decoder layer of Yuan 2.0 from vLLM's parts.

Tensor suffixes: T tokens of the step, H hidden size, N heads of this rank, D channels of a head.

Heads over ranks: the published `q_proj` makes q *and* k of the first half of the heads, `k_proj` of the
second half, head by head, first q, then k. Rank r holds the r-th part of `q_proj`'s rows and the r-th part
of `k_proj`'s, so whole heads of either half; `v_proj` is split in the same two halves, and `o_proj` takes
its input in that order.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from yuan2_vllm.filter import LocalizedFilter
from yuan2_vllm.linear import OrderedRowParallelLinear

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Yuan2DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that also adds the residual."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Yuan2Attention(vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Yuan2MLP(vllm_config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two summands of the layer's output, [T, H] each: the next layer's norm adds them."""
        if residual is None:
            a, residual = self.input_layernorm(x), x
        else:
            a, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, a), residual)
        return self.mlp(x), residual


class Yuan2Attention(nn.Module):
    """q and k of the filtered input, v of the input itself."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantised = vllm_config.model_config.hf_config, vllm_config.quant_config
        hidden, heads = config.hidden_size, config.num_attention_heads
        ranks = get_tensor_model_parallel_world_size()
        self.heads, self.head_dim, self.padded_dim = heads // ranks, hidden // heads, config.head_dim
        self.lf_gate = LocalizedFilter(hidden, vllm_config, f"{prefix}.lf_gate")
        self.qk_proj = MergedColumnParallelLinear(
            hidden, [hidden] * 2, bias=False, quant_config=quantised, prefix=f"{prefix}.qk_proj"
        )
        self.v_proj = MergedColumnParallelLinear(
            hidden, [hidden // 2] * 2, bias=False, quant_config=quantised, prefix=f"{prefix}.v_proj"
        )
        self.o_proj = OrderedRowParallelLinear(
            hidden, hidden, bias=False, quant_config=quantised, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = get_rope(self.head_dim, config.max_position_embeddings, rope_parameters=ROPE)
        self.attn = Attention(
            self.heads,
            self.padded_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantised,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, a_TH: Tensor) -> Tensor:
        qk, _ = self.qk_proj(self.lf_gate(a_TH))
        qk_TN2D = qk.view(-1, self.heads, 2, self.head_dim)
        q, k = self.rotary_emb(positions, qk_TN2D[:, :, 0].flatten(1), qk_TN2D[:, :, 1].flatten(1))
        v, _ = self.v_proj(a_TH)
        heard = self.attn(self._padded(q), self._padded(k), self._padded(v))
        output_TH: Tensor
        output_TH, _ = self.o_proj(self._without_padding(heard))
        return output_TH

    def _padded(self, x: Tensor) -> Tensor:
        if self.padded_dim == self.head_dim:
            return x
        x_TND = x.view(-1, self.heads, self.head_dim)
        return F.pad(x_TND, (0, self.padded_dim - self.head_dim)).flatten(1)

    def _without_padding(self, x: Tensor) -> Tensor:
        if self.padded_dim == self.head_dim:
            return x
        return x.view(-1, self.heads, self.padded_dim)[:, :, : self.head_dim].flatten(1)


class Yuan2MLP(nn.Module):
    """`down(gate(x) * silu(up(x)))`. vLLM's fused activation takes silu of the first half: of up."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quantised = vllm_config.model_config.hf_config, vllm_config.quant_config
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up_gate_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, bias=False, quant_config=quantised, prefix=f"{prefix}.up_gate_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=False, quant_config=quantised, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = SiluAndMul()

    def forward(self, x_TH: Tensor) -> Tensor:
        both, _ = self.up_gate_proj(x_TH)
        output_TH: Tensor
        output_TH, _ = self.down_proj(self.act_fn(both))
        return output_TH
