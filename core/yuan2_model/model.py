"""`Yuan2Model` and `Yuan2ForCausalLM`: Yuan 2.0 called as transformers models are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationMixin, PreTrainedModel

from yuan2_core.conversation import IGNORED
from yuan2_model.cache import Yuan2Cache
from yuan2_model.config import Yuan2Config
from yuan2_model.layers import DecoderLayer, LanguageModelHead, PairConvolution, RMSNorm, rotation
from yuan2_model.layout import Layout, lay_out
from yuan2_model.loss import LossSum, shifted_labels
from yuan2_model.noise import noise
from yuan2_model.outputs import CACHE_NAME, DecodedOutput, Yuan2Output
from yuan2_model.rows import Rows


class Yuan2PreTrainedModel(PreTrainedModel):
    """What transformers, PEFT and DeepSpeed ask of a model class."""

    config_class = Yuan2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers declares it so
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMSNorm):
            module.weight.data.fill_(1.0)
        elif isinstance(module, (nn.Linear, nn.Embedding, PairConvolution)):
            module.weight.data.normal_(0.0, self.config.initializer_range)
            if isinstance(module, PairConvolution):
                module.bias.data.zero_()


class Yuan2Model(Yuan2PreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: Yuan2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.eod_token)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim = config.dimensions().head_dim
        self.gradient_checkpointing = False
        self.noise_alpha = 0.0  # in training, the size of the noise on embeddings (NEFTune)
        self.checkpoint_every = 1  # with gradient checkpointing, of so many layers one is computed again
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Yuan2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        document_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
        labels: Tensor | None = None,
        only_labelled: bool = False,
        rows: Rows | None = None,
    ) -> DecodedOutput:
        """Hidden states after the final norm, [B, T, H]; parameters as in `Yuan2ForCausalLM.forward`.

        With `only_labelled`, [1, L, H]: those alone that are scored against a label; unless hidden states are
        asked for, which are of all tokens.
        """
        if rows is not None:
            return self._of_rows(rows)
        x_BTH = self._embedded(input_ids, inputs_embeds)
        tokens = x_BTH.shape[1]
        packed = document_ids is not None or previous_ids is not None
        cache = self._cache(past_key_values, use_cache, packed)
        layout = lay_out(x_BTH, cache, attention_mask, position_ids, document_ids, previous_ids)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        next_BT = None if labels is None else shifted_labels(labels, layout.starts_S)
        outputs_L = None
        if next_BT is not None and only_labelled and not wanted:
            outputs_L = (next_BT.flatten() != IGNORED).nonzero().flatten()
            next_BT = next_BT.flatten()[outputs_L].unsqueeze(0)
        x_BTH, inputs = self._through_layers(x_BTH, layout, cache, outputs_L)
        if cache is not None:
            cache.advance(tokens, layout.valid_BS)
        x_BTH = self.norm(x_BTH)
        return DecodedOutput(
            last_hidden_state=x_BTH,
            hidden_states=(*inputs, x_BTH) if wanted else None,
            next_ids=next_BT,
            every=None if outputs_L is None else True,
            **{CACHE_NAME: cache},
        )

    def _of_rows(self, rows: Rows) -> DecodedOutput:
        x_BTH, _ = self._through_layers(self.embed_tokens(rows.input_ids), rows.layout, None, rows.outputs_L)
        return DecodedOutput(last_hidden_state=self.norm(x_BTH), next_ids=rows.next_1L, every=True)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embedded.shape[1] == 0:
            raise ValueError("input_ids holds no token")
        return embedded

    def _cache(self, given: Yuan2Cache | None, use_cache: bool | None, packed: bool) -> Yuan2Cache | None:
        """The cache to fill: the given one, a new one, or none (as in training, unless asked for)."""
        if given is not None and not isinstance(given, Yuan2Cache):
            raise TypeError(f"past_key_values must be a Yuan2Cache, found {type(given).__name__}")
        if given is None and use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if given is not None or use_cache:
            if packed:
                raise ValueError(
                    "document_ids cannot be combined with a cache: decode each document by itself"
                )
            if self.gradient_checkpointing and self.training:
                raise ValueError("gradient checkpointing runs layers twice: pass use_cache=False with it")
        return Yuan2Cache(len(self.layers)) if given is None and use_cache else given

    def _through_layers(
        self, x_BTH: Tensor, layout: Layout, cache: Yuan2Cache | None, outputs_L: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        if self.training and self.noise_alpha:
            x_BTH = x_BTH + noise(x_BTH, layout, self.noise_alpha)
        turn = rotation(layout.positions_BT, self.head_dim, x_BTH.dtype)
        inputs = []
        for index, layer in enumerate(self.layers):
            inputs.append(x_BTH)
            if index == len(self.layers) - 1:
                layout = replace(layout, outputs_L=outputs_L)
            if self.gradient_checkpointing and self.training and index % self.checkpoint_every == 0:
                x_BTH = self._gradient_checkpointing_func(layer.__call__, x_BTH, layout, turn, cache)
            else:
                x_BTH = layer(x_BTH, layout, turn, cache)
        return x_BTH, inputs


class Yuan2ForCausalLM(Yuan2PreTrainedModel, GenerationMixin):
    """Yuan 2.0 with its output layer, tied to the embedding in every published checkpoint."""

    # transformers 5 reads what is tied to what; transformers 4 reads the keys.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Yuan2Config) -> None:
        super().__init__(config)
        self.model = Yuan2Model(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.label_smoothing = 0.0  # in training, the share of a label that is spread over the vocabulary
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Yuan2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        document_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
        return_logits: bool = True,
        loss_reduction: str = "mean",
        loss_chunk: int | None = None,
        rows: Rows | None = None,
    ) -> Yuan2Output | tuple[Any, ...]:
        """Logits and, given labels, the shifted cross-entropy.

        Args:
            input_ids: [B, T] token ids; or `inputs_embeds`, [B, T, H].
            attention_mask: [B, T] or [B, S], 0 in padding at the left or right of this call's rows; or a [B,
                1, T, S] mask for attention alone. Right-padded rows need none when only their real tokens'
                outputs count.
            position_ids: [B, T]; by default each token's distance from the start of its sequence.
            past_key_values: a `Yuan2Cache`; it is extended in place and returned.
            labels: [B, T], -100 where nothing is learned; position t is scored against label t + 1, and the
                label of a sequence's first token is ignored.
            use_cache: return a cache; by default as config.json says, but not in training mode.
            logits_to_keep: logits of this many last positions only; 0 for all.
            document_ids: [B, T], equal within a document: in a packed row each document sees itself only, in
                attention, positions and the localized filter.
            previous_ids: [B, T], instead of `document_ids`, for sequences with the same beginning, which is
                in the row once: the column of the token that each one follows, -1 at the start of a
                sequence. The label of a sequence's first own token is ignored, as a first token's is.
            return_logits: False with labels: the loss comes from chunks of labelled positions and logits are
                never kept (`loss_chunk` positions at once).
            loss_reduction: "mean" over labelled positions, or their "sum"; with `return_logits` False also
                "none": the loss of each, [L] in their order.
            rows: instead of tokens, labels, masks and documents: the same worked out by `prepare_rows`; with
                `return_logits=False`.

        Returns:
            `Yuan2Output`, or a tuple of its set fields with `return_dict=False`.
        """
        _check_arguments(output_attentions, loss_reduction, logits_to_keep, labels, return_logits, rows)
        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            document_ids=document_ids,
            previous_ids=previous_ids,
            labels=labels,
            only_labelled=not return_logits,
            rows=rows,
        )
        logits = self.lm_head(decoded.last_hidden_state[:, -logits_to_keep:]) if return_logits else None
        loss = None
        if decoded.next_ids is not None:
            each = loss_reduction == "none"
            loss = self._loss(decoded, logits, decoded.next_ids, loss_chunk, each)
        output = Yuan2Output(
            loss=None if loss is None else (loss.mean() if loss_reduction == "mean" else loss.total),
            logits=logits,
            hidden_states=decoded.hidden_states,
            labelled=None if loss is None else loss.labelled,
            **{CACHE_NAME: decoded.past_key_values},
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self, decoded: DecodedOutput, logits: Tensor | None, next_BT: Tensor, chunk: int | None, each: bool
    ) -> LossSum:
        every = bool(decoded.every)
        count = next_BT.numel() if every else int((next_BT != IGNORED).sum())
        smoothing = self.label_smoothing if self.training else 0.0
        if logits is None:
            total = self.lm_head(decoded.last_hidden_state, next_BT, chunk, each, every, smoothing)
            return LossSum(total, count)
        flat, labels = logits.flatten(0, 1).float(), next_BT.flatten()
        total = cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        return LossSum(total, count)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: LanguageModelHead) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Yuan2Cache | None = None,
        cache: Yuan2Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_bookkeeping: Any,
    ) -> dict[str, Any]:
        """What `generate` passes to `forward` next: the tokens that the cache has not seen.

        `cache` is what newer versions of transformers call `past_key_values`.
        """
        past_key_values = past_key_values if cache is None else cache
        seen = 0 if past_key_values is None else past_key_values.length
        # The mask counts every column, also those of a prompt that was given as embeddings.
        columns = (input_ids if attention_mask is None else attention_mask).shape[1]
        arguments = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }
        if inputs_embeds is not None and seen == 0:
            return arguments | {"inputs_embeds": inputs_embeds}
        return arguments | {"input_ids": input_ids[:, -max(1, columns - seen) :]}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: a cache made by `generate` itself would have no room for the filter's state."""
        return False

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> Yuan2ForCausalLM:
        """Load a model directory; never the hub, never remote code. See `yuan2_model.weights.load_model`."""
        from yuan2_model.weights import load_model

        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype and torch_dtype are two names of one parameter: give one")
        return load_model(directory, dtype=dtype if torch_dtype is None else torch_dtype, device=device)

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write the published layout. See `yuan2_model.weights.save_model`."""
        from yuan2_model.weights import save_model

        save_model(self if state_dict is None else state_dict, self.config, save_directory, max_shard_size)


def _check_arguments(
    output_attentions: bool | None,
    loss_reduction: str,
    logits_to_keep: int,
    labels: Tensor | None,
    logits: bool,
    rows: Rows | None,
) -> None:
    """Refuse what cannot be honoured."""
    if output_attentions:
        raise ValueError(
            "output_attentions: attention weights are never formed; ask for output_hidden_states"
        )
    known = ("mean", "sum") if logits else ("mean", "sum", "none")
    if loss_reduction not in known:
        raise ValueError(f"loss_reduction must be one of {', '.join(known)}, found {loss_reduction!r}")
    if logits_to_keep < 0 or (logits_to_keep and labels is not None):
        raise ValueError("logits_to_keep must be at least 0, and 0 with labels")
    if rows is not None:
        if logits:
            raise ValueError("rows hold what is learned only: pass return_logits=False with them")
        return
    if labels is None and not logits:
        raise ValueError("return_logits=False needs labels: nothing would be computed")
