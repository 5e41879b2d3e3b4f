"""`Yuan2Config`: the published config.json of Yuan 2.0 as a transformers configuration."""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig

from yuan2_model.dimensions import MODEL_TYPE, Dimensions, read_dimensions

PUBLISHED_ARCHITECTURE = "YuanForCausalLM"
"""The class name in published files: other Yuan 2.0 tools look it up in `architectures`."""
_NOT_PUBLISHED = ("transformers_version", "_name_or_path", "_attn_implementation_autoset", "dtype")


class Yuan2Config(PretrainedConfig):
    """Dimensions and token ids of a Yuan 2.0 model; the defaults are those of Yuan2-2B.

    Fields that steer only the original code are kept and written back but change nothing here: `auto_map` (no
    remote code is ever run), `use_flash_attention` (what is installed decides), `reset_attention_mask`,
    `reset_position_ids` (documents are told apart by `document_ids`), `use_loss_mask` (labels carry the mask)
    and `dropout` (the published recipe trains without). Any other published field is kept too.

    Raises:
        ModelFilesError: a field is impossible (see `yuan2_model.dimensions.read_dimensions`).
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers declares it so

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
        initializer_range: float = 0.02,
        use_cache: bool = True,
        causal_mask: bool = True,
        use_flash_attention: bool = False,
        reset_attention_mask: bool = True,
        reset_position_ids: bool = True,
        use_loss_mask: bool = False,
        dropout: float = 0.0,
        eod_token: int = 77185,
        sep_token: int = 77187,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **published: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        positions = max_position_embeddings or model_max_length or 8192
        self.max_position_embeddings = positions
        self.model_max_length = model_max_length or positions
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.causal_mask = causal_mask
        self.use_flash_attention = use_flash_attention
        self.reset_attention_mask = reset_attention_mask
        self.reset_position_ids = reset_position_ids
        self.use_loss_mask = use_loss_mask
        self.dropout = dropout
        self.eod_token = eod_token
        self.sep_token = sep_token
        published.setdefault("architectures", [PUBLISHED_ARCHITECTURE])
        super().__init__(
            pad_token_id=eod_token if pad_token_id is None else pad_token_id,
            bos_token_id=eod_token if bos_token_id is None else bos_token_id,
            eos_token_id=eod_token if eos_token_id is None else eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **published,
        )
        self.dimensions()

    def dimensions(self) -> Dimensions:
        """The checked dimensions; raises `ModelFilesError` as `read_dimensions` does."""
        fields = {name: getattr(self, name) for name in Dimensions.__dataclass_fields__}
        fields |= {
            "hidden_act": self.hidden_act,
            "causal_mask": self.causal_mask,
            "model_type": self.model_type,
        }
        return read_dimensions(fields)

    def published(self) -> dict[str, Any]:
        """The document that stands in config.json: published names, in order, none of the library's."""
        document: dict[str, Any] = super().to_diff_dict()
        torch_dtype = document.pop("torch_dtype", None) or document.get("dtype")
        for name in _NOT_PUBLISHED:
            document.pop(name, None)
        for name in _WRITTEN_ALWAYS:
            document[name] = getattr(self, name)
        if torch_dtype is not None:
            document["torch_dtype"] = str(torch_dtype).removeprefix("torch.")
        order = {name: place for place, name in enumerate(_WRITTEN_ALWAYS)}
        return dict(sorted(document.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))

    def to_json_string(self, use_diff: bool = True) -> str:
        """config.json as text; `use_diff` is transformers' parameter: False adds the library's own fields."""
        document = self.published() if use_diff else self.to_dict()
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


_WRITTEN_ALWAYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "model_max_length",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "causal_mask",
    "use_flash_attention",
    "reset_attention_mask",
    "reset_position_ids",
    "use_loss_mask",
    "dropout",
    "eod_token",
    "sep_token",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Written even where they equal a default, so that the file says what the model is."""
