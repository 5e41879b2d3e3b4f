"""LoRA adapters through PEFT: put beside the linear layers of a model, saved in PEFT's layout.

PEFT's layers are injected into the model, which stays a `Yuan2ForCausalLM`: the loop, evaluation and
DeepSpeed see the same class in every method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from yuan2_core.sections import LoRA
from yuan2_model import Yuan2ForCausalLM
from yuan2_model.adapters import ADAPTER_WEIGHTS
from yuan2_trainer.model.quantised import silence_kernel_advice

_PREFIX = "base_model.model."
"""What PEFT's own wrapper puts before the names of the model's parameters."""
_ADAPTER = "default"


def adapter_config(adapter: LoRA, base: str) -> Any:
    """PEFT's configuration of an adapter to the model directory `base`."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        # An integer where it is one: PEFT declares it so, and other readers may insist.
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=sorted(set(adapter.target_modules)),
        use_rslora=adapter.rs_lora,
        use_dora=adapter.dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def add_adapter(model: Yuan2ForCausalLM, adapter: LoRA, base: str) -> Yuan2ForCausalLM:
    """Freeze a model and put trainable matrices of zero effect, in its type, beside its target layers.

    The first matrices are drawn from torch's global generator: seed it before.
    """
    silence_kernel_advice()
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapter_config(adapter, base), model, adapter_name=_ADAPTER)
    dtype = model.get_input_embeddings().weight.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def published_name(name: str) -> str:
    """A parameter's name without the layers that PEFT puts around it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is the adapter's."""
    return ".lora_" in name


def save_adapter(state: Mapping[str, Tensor], adapter: LoRA, base: str, directory: Path) -> None:
    """Write the adapter's tensors among `state` (by the adapted model's names) as PEFT reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    adapter_config(adapter, base).save_pretrained(str(directory))
    tensors = {_saved_name(name): tensor.contiguous() for name, tensor in state.items() if is_adapter(name)}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def save_base_config(base: Path, directory: Path) -> None:
    """Write the base's config.json beside its adapter, without the code that it names: that stays behind."""
    document = json.loads((base / "config.json").read_text("utf-8"))
    document.pop("auto_map", None)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def _saved_name(name: str) -> str:
    """PEFT leaves out the adapter's name, and for DoRA's magnitudes `.weight` as well."""
    head, _, tail = name.partition(f".{_ADAPTER}")
    return _PREFIX + head + ("" if head.endswith("lora_magnitude_vector") else tail)
