"""What serving with vLLM needs: memory of weights, and tokens of caches that fit beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from yuan2_core.estimate.gpus import Gpu
from yuan2_core.estimate.run import Shape

UTILIZATION: Final = 0.92
"""Share of a GPU's memory that vLLM takes by default (0.32, `gpu_memory_utilization`)."""
OVERHEAD_BYTES: Final = 3 << 30
"""Of each GPU, for CUDA's context, NCCL, activations of 8,192 tokens and CUDA graphs. An assumption: vLLM
measures it when it starts."""


@dataclass(frozen=True)
class Serving:
    """A worker's model on its GPUs.

    Attributes:
        shape: the model.
        gpu: one of the worker's GPUs.
        gpus: their number; each holds its part of every layer and cache (tensor parallel).
        linear_bits: bits of a weight of the linear layers: 16, or fewer when they are quantised. The filter
            and the embedding, which is the output layer too, stay at 16.
    """

    shape: Shape
    gpu: Gpu
    gpus: int = 1
    linear_bits: int = 16

    @property
    def weight_bytes(self) -> int:
        """Of all GPUs together."""
        layer = self.shape.layer_linears * self.linear_bits // 8 + 2 * self.shape.layer_filter
        return self.shape.layers * layer + 2 * self.shape.embedding

    @property
    def token_bytes(self) -> int:
        """Of a cached token: a key and a value in each layer, in bf16, on all GPUs together."""
        return 2 * 2 * self.shape.layers * self.shape.hidden

    @property
    def cached_tokens(self) -> int:
        """Tokens of all running requests that fit; 0 when the weights do not."""
        room = self.gpus * (UTILIZATION * self.gpu.memory_bytes - OVERHEAD_BYTES) - self.weight_bytes
        return max(0, int(room // self.token_bytes))
