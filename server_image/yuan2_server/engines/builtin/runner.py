"""Runs the model over what the scheduler chose. Tensor suffixes: B batch, T positions, H hidden, V
vocabulary."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from yuan2_core.errors import UserError
from yuan2_core.host_memory import available_bytes
from yuan2_core.processors import available_cpus
from yuan2_core.sections import Device, ServePrecision
from yuan2_server.engines.builtin.cache import CacheStore, token_budget, token_bytes
from yuan2_server.engines.builtin.scheduler import Slice
from yuan2_server.protocol import ErrorCode, RequestError
from yuan2_server.sequence import Embedding, Entry

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ModelRunner:
    """Prefills prompts and decodes, one sequence after the other, keeping a cache for each.

    All methods run on the engine's thread.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._caches = CacheStore()
        self._sums: dict[int, Tensor] = {}
        """Of each running embedding the sum of its current text's hidden states, [H]."""

    @property
    def cached_sequences(self) -> int:
        """Caches held."""
        return len(self._caches)

    def run(self, work: tuple[Slice, ...]) -> list[Tensor]:
        """Of each slice the logits [V] after its last position; of one of an `Embedding` the mean of the last
        hidden states (after the final norm) of the text so far, scaled to length 1: [H].

        Raises RequestError when memory runs out.
        """
        try:
            return [self._run_slice(piece) for piece in work]
        except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise _memory_error(error) from error

    def forget(self, sequence: Entry) -> None:
        """Drop the cache of a sequence."""
        self._caches.drop(sequence)
        self._sums.pop(sequence.id, None)

    @torch.inference_mode()
    def check(self) -> None:
        """Run a single token. Raises what the model raises; on a GPU also what earlier work left there."""
        hidden_BTH = self._model.model(input_ids=self._ids([0]), use_cache=False).last_hidden_state
        float(self._model.lm_head(hidden_BTH[0, -1]).float().sum())

    @torch.inference_mode()
    def _run_slice(self, piece: Slice) -> Tensor:
        sequence = piece.sequence
        output = self._model.model(
            input_ids=self._ids(piece.token_ids),
            past_key_values=self._caches.get(sequence),
            use_cache=True,
        )
        self._caches.put(sequence, output.past_key_values)
        hidden_TH = output.last_hidden_state[0]
        if isinstance(sequence, Embedding):
            self._sums[sequence.id] = self._sums.get(sequence.id, 0.0) + hidden_TH.float().sum(dim=0)
            return torch.nn.functional.normalize(self._sums[sequence.id], dim=0)
        return self._model.lm_head(hidden_TH[-1])

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], device=self._device)


def _memory_error(error: Exception) -> Exception:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return RequestError(
            ErrorCode.CUDA_OUT_OF_MEMORY,
            "out of memory; send a shorter prompt, or lower maxModelLength or maxConcurrentRequests",
        )
    return error


def cached_token_budget(model: Any, device: Device) -> int:
    """Tokens of cache that fit beside the loaded weights."""
    config = model.config
    element_size = next(model.parameters()).element_size()
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes() or 0
    return token_budget(free, token_bytes(config.num_hidden_layers, config.hidden_size, element_size))


def load(path: str, device: Device, precision: ServePrecision, adapter: str | None = None) -> Any:
    """A `yuan2_model.Yuan2ForCausalLM` for inference, on its device, an adapter's directory merged into it.

    Raises:
        UserError: its files or the adapter's are not whole, or do not belong together.
    """
    from yuan2_model.weights import load_model

    if device == "cpu":
        torch.set_num_threads(available_cpus())
    elif not torch.cuda.is_available():
        raise UserError(
            "gpusPerWorker: there is no GPU in this pod that torch can use; leave it out to serve on the CPU"
        )
    model = load_model(path, dtype=DTYPES[precision], device=device)
    if adapter is not None:
        from yuan2_model.adapters import with_adapter

        model = with_adapter(model, adapter)
    return model.eval().requires_grad_(False)
