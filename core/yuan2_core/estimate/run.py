"""What an estimate is made from: the model's shape, the run, its data and the software that runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from yuan2_core.conflicts import OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS, QLORA_STAGE_3, MethodName
from yuan2_core.estimate.gpus import Gpu
from yuan2_core.sections import Offload
from yuan2_core.zero_limits import (
    LIVE_PARAMETERS,
    PERSISTENCE_THRESHOLD,
    PREFETCH_BUCKET,
    Zero3Limits,
    zero_3_limits,
)

Stage = Literal[0, 2, 3]

PACKING_FILL: Final = 0.98
"""Share of a packed row that holds tokens (the trainer's own goal for Alpaca at 2048)."""
_HIDDEN_TO_HIDDEN: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


class Dimensions(Protocol):
    """Numbers of a config.json; `presets.Preset` and `yuan2_model`'s dimensions have them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """Weights of a Yuan 2.0 model by their kind; its vectors (norms, biases) are too small to count."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int

    @staticmethod
    def of(dimensions: Dimensions) -> Shape:
        """The shape of a preset or of a config.json."""
        return Shape(
            dimensions.hidden_size,
            dimensions.num_hidden_layers,
            dimensions.intermediate_size,
            dimensions.vocab_size,
        )

    @property
    def layer_linears(self) -> int:
        """Weights of a layer's seven linear modules."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def layer_filter(self) -> int:
        """Weights of a layer's two convolutions: what QLoRA leaves as it is in the published code."""
        return 2 * self.hidden**2

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.layer_linears + self.layer_filter

    @property
    def embedding(self) -> int:
        """Weights of the embedding, which is the output layer too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; the tied output layer counts once."""
        return self.embedding + self.layers * self.layer

    def adapter(self, rank: int, targets: tuple[str, ...], at_most: float = math.inf) -> int:
        """Weights of LoRA's pairs of matrices, or of those matrices alone that have `at_most` so many."""
        wide = (self.hidden, self.intermediate)
        sides = dict.fromkeys(_HIDDEN_TO_HIDDEN, (self.hidden, self.hidden))
        matrices = [rank * side for name in targets for side in sides.get(name, wide)]
        return self.layers * sum(size for size in matrices if size <= at_most)


@dataclass(frozen=True)
class Software:
    """What differs between implementations of the same mathematics.

    Attributes:
        name: who computes.
        chunked_loss: logits are held in chunks of labelled positions; else all at once, in several copies.
        layer_vectors: most vectors of the hidden size that a layer holds per token in its backward pass.
        batches_of_rows: a batch counts packed rows; else it counts sequences, and packing them leaves fewer
            rows to a step.
        quantised_filter: QLoRA keeps the localized filter's convolutions in 4 bits too; else in full.
        zero_3: ZeRO-3's limits; None: those that fit the model (`zero_limits`).
    """

    name: str
    chunked_loss: bool
    layer_vectors: int
    batches_of_rows: bool
    quantised_filter: bool
    zero_3: Zero3Limits | None = None


OURS: Final = Software(
    "yuan2_trainer", chunked_loss=True, layer_vectors=40, batches_of_rows=False, quantised_filter=True
)
"""29 that a layer's forward pass saves, measured on `yuan2_model`'s layer in bf16 with fused attention, and
up to 11 gradients and temporaries of its MLP in the backward pass."""
PUBLISHED: Final = Software(
    "published code",
    chunked_loss=False,
    layer_vectors=60,
    batches_of_rows=True,
    quantised_filter=False,
    zero_3=Zero3Limits(LIVE_PARAMETERS, PREFETCH_BUCKET, PERSISTENCE_THRESHOLD),
)
"""The model code published with Yuan 2.0 under FastChat or LLaMA-Factory: counted from its eager operations
(norms in fp32, filter through conv2d's layout, rotary embedding and MLP unfused, flash attention)."""


@dataclass(frozen=True)
class Data:
    """Samples and how they lie in rows.

    Attributes:
        samples: sequences of an epoch.
        mean_tokens: tokens of a sequence on average.
        layout: `padded` to the longest length allowed; `grouped`: micro batches of similar length, padded to
            their longest; `packed`: many sequences a row.
        epochs: passes over the samples.
    """

    samples: int
    mean_tokens: float
    layout: Literal["padded", "grouped", "packed"] = "packed"
    epochs: float = 1.0

    def row_tokens(self, length: int) -> float:
        """Tokens that a row takes through the model, padding included."""
        return min(self.mean_tokens, length) if self.layout == "grouped" else float(length)

    def rows_per_sequence(self, length: int) -> float:
        """Rows that a sequence takes; less than one when several share a row."""
        if self.layout != "packed":
            return 1.0
        return min(1.0, self.mean_tokens / (length * PACKING_FILL))

    @property
    def sequences(self) -> float:
        """Sequences of all epochs."""
        return self.samples * self.epochs


@dataclass(frozen=True)
class Run:
    """A fine-tuning as far as memory and time depend on it.

    Attributes:
        shape: the model.
        method: what is trained.
        stage, offload: ZeRO stage, and what lies in the host's memory.
        length, micro_batch, accumulation: tokens of a row, rows of a micro batch, micro batches of a step.
        gpus_per_node, nodes: processes, one a GPU.
        gpu: None when it is not known; there is neither time nor a verdict then.
        lora_rank, lora_targets: of `lora` and `qlora`.
        checkpointing, checkpointing_every: whether layers are computed again in the backward pass, and one of
            how many.
        value_bytes: bytes of a weight or an activation, 2 for bf16 and 4 for fp32.
        gradient_bytes: bytes of a gradient on its way between ranks and in sums; None: as a weight.
        max_steps: optimizer steps, instead of the epochs of `data`.
        data: None when it is not known.
        software: who computes.

    Raises:
        ValueError: a combination that cannot be run.
    """

    shape: Shape
    method: MethodName
    stage: Stage
    length: int
    micro_batch: int
    accumulation: int
    gpus_per_node: int
    nodes: int = 1
    gpu: Gpu | None = None
    offload: Offload = "none"
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    checkpointing: bool = True
    checkpointing_every: int = 1
    value_bytes: Literal[2, 4] = 2
    gradient_bytes: Literal[2, 4] | None = None
    max_steps: int | None = None
    data: Data | None = None
    software: Software = field(default=OURS)

    def __post_init__(self) -> None:
        for text in _conflicts(self):
            raise ValueError(text)

    @property
    def world(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch at full length."""
        return self.micro_batch * self.length

    @property
    def trainable(self) -> int:
        """Weights that the optimizer knows."""
        if self.method == "full":
            return self.shape.parameters
        return self.shape.adapter(self.lora_rank, self.lora_targets)

    @property
    def summed_bytes(self) -> int:
        """Bytes of a gradient on its way between ranks and in sums over micro batches."""
        return self.gradient_bytes or self.value_bytes

    @property
    def zero_3(self) -> Zero3Limits:
        """What ZeRO-3 may hold of other ranks' parameters."""
        return self.software.zero_3 or zero_3_limits(self.shape.hidden, self.shape.layer)

    @property
    def persistent_adapter(self) -> int:
        """Weights of LoRA's matrices that ZeRO-3 never cuts."""
        return self.shape.adapter(self.lora_rank, self.lora_targets, self.zero_3.persistent)

    @property
    def shards(self) -> int:
        """Ranks that gradients and optimizer state are divided among."""
        return self.world if self.stage >= 2 else 1

    @property
    def recomputed(self) -> float:
        """Share of the layers that are computed again."""
        if not self.checkpointing:
            return 0.0
        return math.ceil(self.shape.layers / self.checkpointing_every) / self.shape.layers

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run, None when neither they nor the data are known."""
        if self.max_steps is not None:
            return self.max_steps
        if self.data is None:
            return None
        share = self.data.rows_per_sequence(self.length) if self.software.batches_of_rows else 1.0
        return math.ceil(self.data.sequences * share / (self.world * self._batch))

    @property
    def rows_per_step(self) -> float:
        """Rows that a process takes through the model in an optimizer step, at most that many while the data
        are not known."""
        if self.data is None or self.software.batches_of_rows:
            return float(self._batch)
        return self._batch * self.data.rows_per_sequence(self.length)

    @property
    def _batch(self) -> int:
        return self.micro_batch * self.accumulation


_COUNTS: Final[Mapping[str, str]] = {
    "length": "training.maxLength",
    "micro_batch": "training.microBatchSize",
    "accumulation": "training.gradientAccumulationSteps",
    "gpus_per_node": "workers.gpusPerWorker",
    "nodes": "workers.replicas",
    "lora_rank": "method.lora.r",
    "checkpointing_every": "training.gradientCheckpointingEvery",
}


def _conflicts(run: Run) -> list[str]:
    found = [
        f"{label}: must be at least 1, found {getattr(run, name)}"
        for name, label in _COUNTS.items()
        if getattr(run, name) < 1
    ]
    if run.method == "qlora" and run.stage == 3:
        found.append(QLORA_STAGE_3)
    if run.offload == "parameters" and run.stage != 3:
        found.append(OFFLOAD_PARAMETERS)
    if run.offload == "optimizer" and run.stage == 0:
        found.append(OFFLOAD_OPTIMIZER)
    return found
