"""Sizes of published Yuan 2.0 models and what the published recipe does differently for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

PresetSize = Literal["2B", "51B", "102B"]

VOCABULARY: Final = 135_040
"""Embedding rows of every published model: the 134,958 tokens and padding."""


@dataclass(frozen=True)
class Preset:
    """Dimensions of a published model (its config.json) and the recipe's defaults for it.

    Attributes:
        size: its name.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size: as in config.json.
        max_position_embeddings: longest text in tokens that it was trained for.
        zero_stage: DeepSpeed ZeRO stage of the published recipe.
    """

    size: PresetSize
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    zero_stage: Literal[2, 3]
    vocab_size: int = VOCABULARY

    @property
    def parameters(self) -> int:
        """Trainable numbers in the model; the tied output matrix counts once."""
        hidden = self.hidden_size
        half = hidden // 2
        attention = 4 * hidden * hidden
        mlp = 3 * hidden * self.intermediate_size
        convolutions = (2 * hidden * half + half) + (2 * half * hidden + hidden)
        norms = 3 * hidden
        layer = attention + mlp + convolutions + norms
        return self.vocab_size * hidden + self.num_hidden_layers * layer + hidden


PRESETS: Final[Mapping[str, Preset]] = {
    "2B": Preset("2B", 2048, 24, 32, 8192, 8192, zero_stage=2),
    "51B": Preset("51B", 8192, 42, 64, 32768, 4096, zero_stage=3),
    "102B": Preset("102B", 8192, 84, 64, 32768, 4096, zero_stage=3),
}

DEFAULT_ZERO_STAGE: Final = 2
"""ZeRO stage of a model that is none of the presets."""

_COMPARED: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


def zero_stage(size: str, method: str = "full") -> Literal[0, 2, 3]:
    """ZeRO stage when the user names none: 2 for 2B and custom, 3 for 51B and 102B, and none for QLoRA.

    The published QLoRA runs use no ZeRO: its 4-bit weights cannot be divided, and its adapters need not be.
    """
    if method == "qlora":
        return 0
    preset = PRESETS.get(size)
    return preset.zero_stage if preset else DEFAULT_ZERO_STAGE


def config_differences(config: Mapping[str, object], size: str) -> list[str]:
    """Where a model's config.json is not of the size it is said to be, a sentence each.

    Only what decides the shape of the weights and their use is compared. `custom` takes any config.

    Raises:
        KeyError: `size` is neither a preset nor `custom`.
    """
    if size == "custom":
        return []
    preset = PRESETS[size]
    wanted = {name: getattr(preset, name) for name in _COMPARED}
    return [
        _difference(name, config.get(name), value, size)
        for name, value in wanted.items()
        if config.get(name) != value
    ]


def _difference(name: str, found: object, wanted: int, size: str) -> str:
    if found is None:
        return f"config.json has no {name}, which is {wanted} in Yuan 2.0 {size}"
    return f"config.json has {name} {found}, but Yuan 2.0 {size} has {wanted}"
