"""`--deepspeed FILE`: what its settings mean here. Values of `auto` are those of the flags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from yuan2_core.conflicts import PASSED_ON
from yuan2_core.sections import WITHOUT_FP16, Offload
from yuan2_trainer.model.deepspeed import FLOPS_PROFILER, zero_section
from yuan2_trainer.pod.outcome import JobError

AUTO: Final = "auto"
_OWN: Final[Mapping[str, Any]] = {
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""Top-level settings that say what is so without them."""
_READ: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "optimizer",
    "scheduler",
    "zero_optimization",
    "flops_profiler",
    "data_types",
    "communication_data_type",
)
"""Sections and keys that flags must agree with, or that have a part of their own below."""
_GATHERED: Final = (
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)


@dataclass(frozen=True)
class ZeroSettings:
    """What a file decides."""

    stage: Literal[0, 2, 3] = 0
    """FastChat's script trains without ZeRO when there is no file."""
    offload: Offload = "none"
    flops_profiler: bool = False
    fp32_gradients: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    """What it wants otherwise than the trainer does by itself."""
    notes: list[str] = field(default_factory=list)
    """A sentence for each setting without effect."""


def read_zero_file(path: str) -> dict[str, Any]:
    """The file's content.

    Raises:
        JobError: it cannot be read, or is no JSON object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"--deepspeed {path}: {error.strerror}") from error
    except ValueError as error:
        raise JobError(f"--deepspeed {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise JobError(f"--deepspeed {path} is no JSON object")
    return config


def map_zero_file(path: str, config: Mapping[str, Any], flags: Mapping[str, Any], ranks: int) -> ZeroSettings:
    """What a file means beside the flags.

    Args:
        path: its name, for errors.
        config: its content.
        flags: FastChat's flags with their defaults.
        ranks: processes of all nodes.

    Raises:
        JobError: it contradicts a flag, or asks for what this trainer cannot do; names key and flag.
    """
    for text in _contradictions(config, flags, ranks):
        raise JobError(f"--deepspeed {path}: {text}")
    zero = _section(config, "zero_optimization")
    stage, notes = _stage(path, zero)
    offload = _offload(path, zero, stage, notes)
    profiler = _without_auto(_section(config, "flops_profiler"))
    profiling = profiler.pop("enabled", False) is True
    overrides = _overrides(path, config, notes)
    zero_overrides = _zero_overrides(path, zero, stage, offload, notes)
    if zero_overrides:
        overrides["zero_optimization"] = zero_overrides
    wanted = _differing(profiler, FLOPS_PROFILER)
    if profiling and wanted:
        overrides["flops_profiler"] = wanted
    return ZeroSettings(stage, offload, profiling, _fp32_gradients(path, config), overrides, notes)


def _contradictions(config: Mapping[str, Any], flags: Mapping[str, Any], ranks: int) -> Iterator[str]:
    micro, steps = flags["per_device_train_batch_size"], flags["gradient_accumulation_steps"]
    optimizer = _section(config, "optimizer")
    parameters = _section(optimizer, "params")
    bf16 = _section(config, "bf16") or _section(config, "bfloat16")
    pairs = (
        ("train_micro_batch_size_per_gpu", config, micro, "--per_device_train_batch_size"),
        ("gradient_accumulation_steps", config, steps, "--gradient_accumulation_steps"),
        ("train_batch_size", config, micro * steps * ranks, "batch size, accumulation steps and processes"),
        ("gradient_clipping", config, flags["max_grad_norm"], "--max_grad_norm"),
        ("enabled", bf16, flags["bf16"], "--bf16"),
        ("lr", parameters, flags["learning_rate"], "--learning_rate"),
        ("weight_decay", parameters, flags["weight_decay"], "--weight_decay"),
        ("betas", parameters, [flags["adam_beta1"], flags["adam_beta2"]], "--adam_beta1 and --adam_beta2"),
        ("eps", parameters, flags["adam_epsilon"], "--adam_epsilon"),
    )
    for key, section, wanted, flag in pairs:
        found = section.get(key, AUTO)
        if found not in (AUTO, wanted):
            where = "bf16.enabled" if section is bf16 else key
            said = f"{where} is {json.dumps(found)}, {flag} says {json.dumps(wanted)}"
            yield f"{said}; write auto, or make them agree"
    for key in ("fp16", "amp"):
        if _section(config, key).get("enabled") is True:
            yield f"{key}.enabled is true, but {WITHOUT_FP16}"
    if optimizer.get("type", "AdamW") not in ("Adam", "AdamW"):
        yield f"optimizer.type is {optimizer['type']}, but only AdamW is there; leave the section out"
    if config.get("scheduler"):
        yield "scheduler: the learning rate is decided by --lr_scheduler_type; leave the section out"


def _stage(path: str, zero: Mapping[str, Any]) -> tuple[Literal[0, 2, 3], list[str]]:
    stage = zero.get("stage", 0)
    if stage == 1:
        return 2, [
            f"--deepspeed {path}: ZeRO-1 is trained as ZeRO-2, which needs less memory for the same numbers"
        ]
    if stage in (0, 2, 3):
        return stage, []
    raise JobError(f"--deepspeed {path}: zero_optimization.stage is {json.dumps(stage)}; give 0, 2 or 3")


def _offload(path: str, zero: Mapping[str, Any], stage: int, notes: list[str]) -> Offload:
    devices = {
        key: _section(zero, key).get("device", "none") for key in ("offload_optimizer", "offload_param")
    }
    for key, device in devices.items():
        if device not in ("none", "cpu"):
            raise JobError(f"--deepspeed {path}: {key}.device is {json.dumps(device)}; give cpu or none")
    optimizer = devices["offload_optimizer"] == "cpu" or zero.get("cpu_offload") is True
    parameters = devices["offload_param"] == "cpu" or zero.get("cpu_offload_param") is True
    if (optimizer or parameters) and stage == 0:
        raise JobError(f"--deepspeed {path}: without ZeRO there is nothing to offload; set stage to 2 or 3")
    if parameters and stage != 3:
        notes.append(f"--deepspeed {path}: offload_param has no effect: parameters are not cut before ZeRO-3")
        parameters = False
    if parameters and not optimizer:
        notes.append(f"--deepspeed {path}: the optimizer's state is offloaded as well as the parameters")
    if parameters:
        return "parameters"
    return "optimizer" if optimizer else "none"


def _fp32_gradients(path: str, config: Mapping[str, Any]) -> bool:
    """Whether gradients are summed in fp32: over micro batches or over ranks, which is one field here."""
    wanted = {
        "data_types.grad_accum_dtype": _section(config, "data_types").get("grad_accum_dtype"),
        "communication_data_type": config.get("communication_data_type"),
    }
    for key, found in wanted.items():
        if found not in (None, AUTO, "fp32", "bf16", "bfp16"):
            raise JobError(f"--deepspeed {path}: {key} is {json.dumps(found)}; give fp32, or leave it out")
    return "fp32" in wanted.values()


def _overrides(path: str, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The other sections: passed on where DeepSpeed acts on them here."""
    kept: dict[str, Any] = {}
    for key, value in _differing(_without_auto(config), _OWN).items():
        if key in _READ:
            continue
        if key in PASSED_ON:
            kept[key] = value
        elif not (isinstance(value, Mapping) and value.get("enabled") is False):
            notes.append(f"--deepspeed {path}: {key} has no effect{_instead(key)}")
    return kept


def _instead(key: str) -> str:
    flags = {"activation_checkpointing": "--gradient_checkpointing", "tensorboard": "--report_to tensorboard"}
    return f": {flags[key]} decides that" if key in flags else " in this trainer"


def _zero_overrides(
    path: str, zero: Mapping[str, Any], stage: int, offload: Offload, notes: list[str]
) -> dict[str, Any]:
    rest = _without_auto(zero)
    for key in ("stage", "cpu_offload", "cpu_offload_param"):
        rest.pop(key, None)
    for key, kept in (("offload_optimizer", offload != "none"), ("offload_param", offload == "parameters")):
        section = {name: value for name, value in _section(rest, key).items() if name != "device"}
        rest.pop(key, None)
        if kept and section:
            rest[key] = section
    gathered = [key for key in _GATHERED if rest.pop(key, False)]
    notes.extend(
        f"--deepspeed {path}: {key} has no effect: weights are gathered one by one" for key in gathered
    )
    return _differing(rest, zero_section(stage, "cuda", offload))


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without what is left to the flags (`auto`) and what is not set (null)."""
    cleaned = {
        key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in section.items()
    }
    return {key: value for key, value in cleaned.items() if value not in (AUTO, None)}


def _differing(section: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a section wants otherwise than `own`."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        ours = own.get(key)
        if isinstance(value, Mapping) and isinstance(ours, Mapping):
            below = _differing(value, ours)
            if below:
                found[key] = below
        elif key not in own or ours != value:
            found[key] = value
    return found
