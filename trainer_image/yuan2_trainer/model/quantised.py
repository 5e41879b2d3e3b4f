"""The frozen weights of QLoRA: nf4 with double quantisation, through bitsandbytes (arXiv 2305.14314)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yuan2_model import Yuan2Config, Yuan2ForCausalLM, check_model_directory
from yuan2_model.layers import beside_previous
from yuan2_model.layout import Forks
from yuan2_model.weights import load_config
from yuan2_trainer.model.spreading import spread_tensors

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONVOLUTIONS = ("conv1", "conv2")
QUANTISED = (*LINEAR, *CONVOLUTIONS)
"""All matrices of a block: its linear layers, and the localized filter's convolutions, a ninth of its
weights. Embedding, output layer, norms and biases stay in bf16: they are few and everything passes through
them."""
COMPUTE_TYPE = torch.bfloat16
STORAGE_TYPE = torch.uint8
"""Of the weights in nf4: two in a byte."""


def load_quantised(directory: Path, device: torch.device) -> Yuan2ForCausalLM:
    """Load a model directory with its blocks' matrices in nf4, the rest in bf16; all ranks take part.

    Tensor by tensor: of the full-precision weights no more than one exists at a time.

    Raises:
        ModelFilesError: as `yuan2_model.load_model`.
    """
    silence_kernel_advice()
    facts = check_model_directory(directory)
    config = load_config(facts)
    model = _empty_model(config)
    for name, tensor in spread_tensors(facts, COMPUTE_TYPE, device):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        place = _quantise if is_quantised(name) else _copy
        setattr(module, attribute, place(module, tensor, device))
    model.tie_weights()
    # PEFT asks the model whether its layers are bitsandbytes' ones.
    model.is_loaded_in_4bit = True
    return model


def is_quantised(name: str) -> bool:
    """Whether a parameter of a model that `load_quantised` made, perhaps with an adapter, is in nf4."""
    *_, owner, attribute = name.replace(".base_layer.", ".").split(".")
    return owner in QUANTISED and attribute == "weight"


def dequantised(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """The values that a 4-bit parameter stands for, in the compute type; any other parameter as it is.

    A convolution is quantised as the matrix that it is multiplied as: `shape` is the published one.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(parameter.data, state)
    return values.to(COMPUTE_TYPE).view(*shape)


def _empty_model(config: Yuan2Config) -> Yuan2ForCausalLM:
    with torch.device("meta"):
        model = Yuan2ForCausalLM(config).to(COMPUTE_TYPE)
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.self_attn.lf_gate, layer.mlp):
                for name in QUANTISED:
                    if hasattr(parent, name):
                        setattr(parent, name, _quantised_layer(getattr(parent, name)))
    return model


def _quantised_layer(layer: Any) -> nn.Module:
    plain = isinstance(layer, nn.Linear)
    outputs, inputs = layer.weight.flatten(1).shape
    made = (_linear_4bit() if plain else _convolution_4bit())(
        inputs,
        outputs,
        bias=layer.bias is not None,
        compute_dtype=COMPUTE_TYPE,
        compress_statistics=True,
        quant_type="nf4",
    )
    # A processor with AVX512-BF16 would rearrange the weights in the first evaluation and train on with them.
    made.support_avx512bf16_for_cpu = False
    return made


def _quantise(module: Any, tensor: Tensor, device: torch.device) -> Any:
    from bitsandbytes.nn import Params4bit

    values = tensor.to(COMPUTE_TYPE).flatten(1)
    whole = Params4bit(values, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module)
    return whole.to(device)


def _copy(_: Any, tensor: Tensor, device: torch.device) -> nn.Parameter:
    filled = torch.empty(tensor.shape, dtype=COMPUTE_TYPE, device=device).copy_(tensor)
    return nn.Parameter(filled, requires_grad=False)


def _linear_4bit() -> Any:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit


@cache
def _convolution_4bit() -> Any:
    class PairConvolution4bit(_linear_4bit()):  # type: ignore[misc]
        """`PairConvolution` with weights in nf4, [out, 2 in]."""

        def forward(
            self,
            x_BTC: Tensor,
            before_B1C: Tensor | None,
            starts_S: Tensor | None,
            forks: Forks | None = None,
        ) -> Tensor:
            convolved: Tensor = super().forward(beside_previous(x_BTC, before_B1C, starts_S, forks))
            return convolved

    return PairConvolution4bit


def silence_kernel_advice() -> None:
    """bitsandbytes, which PEFT imports too, advises to fetch a faster kernel from a hub; a pod fetches
    nothing. To be called before either is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
