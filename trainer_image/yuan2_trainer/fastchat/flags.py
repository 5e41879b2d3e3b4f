"""FastChat's flags: their types, their defaults, and what each one means here.

They are those of FastChat 0.2.36's `train_yuan2.py` and `train_lora.py`: two small sets of their own, and all
of `transformers.TrainingArguments` (4.31 to 5.24).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from yuan2_core.errors import UserError
from yuan2_core.sections import WITHOUT_FP16

Kind = Literal["bool", "int", "number", "text", "texts"]
Value = bool | int | float | str | list[str] | None

PROGRAM: Final = "yuan2_trainer.fastchat"
_TRUE: Final = ("yes", "true", "t", "y", "1")
_FALSE: Final = ("no", "false", "f", "n", "0")


class UsageError(UserError):
    """The command line cannot be read."""

    reason = "InvalidJob"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without the dashes.
        kind: how its value is read.
        default: what FastChat's script does without it.
        no_effect: why it changes nothing here; None where it does.
        only: values that this trainer can honour, where it cannot honour all; the default is one of them.
        refusal: why not the others, and the way out.
    """

    name: str
    kind: Kind
    default: Value = None
    no_effect: str | None = None
    only: tuple[Value, ...] | None = None
    refusal: str = ""


def _mapped() -> Iterator[Flag]:
    yield Flag("model_name_or_path", "text")
    yield Flag("data_path", "text")
    yield Flag("output_dir", "text")
    yield Flag("eval_data_path", "text")
    yield Flag("efficient_loss", "bool", False)
    yield Flag("last_response_loss", "bool", False)
    yield Flag("split_example_loss", "bool", False)
    yield Flag("model_max_length", "int", 512)
    yield Flag("num_train_epochs", "number", 3.0)
    yield Flag("max_steps", "int", -1)
    yield Flag("per_device_train_batch_size", "int", 8)
    yield Flag("gradient_accumulation_steps", "int", 1)
    yield Flag("learning_rate", "number", 5e-5)
    yield Flag("weight_decay", "number", 0.0)
    yield Flag("max_grad_norm", "number", 1.0)
    yield Flag("warmup_ratio", "number", 0.0)
    yield Flag("warmup_steps", "int", 0)
    yield Flag("lr_scheduler_type", "text", "linear")
    yield Flag("lr_scheduler_kwargs", "text")
    yield Flag("adam_beta1", "number", 0.9)
    yield Flag("adam_beta2", "number", 0.999)
    yield Flag("adam_epsilon", "number", 1e-8)
    yield Flag("label_smoothing_factor", "number", 0.0)
    yield Flag("neftune_noise_alpha", "number")
    yield Flag("bf16", "bool", False)
    yield Flag("tf32", "bool", False)
    yield Flag("gradient_checkpointing", "bool", False)
    yield Flag("activation_checkpointing", "bool", False)
    yield Flag("seed", "int", 42)
    yield Flag("evaluation_strategy", "text")
    yield Flag("eval_strategy", "text")
    yield Flag("eval_steps", "number")
    yield Flag("save_strategy", "text", "steps")
    yield Flag("save_steps", "number", 500)
    yield Flag("save_total_limit", "int")
    yield Flag("logging_steps", "number", 500)
    yield Flag("report_to", "texts", [])
    yield Flag("deepspeed", "text")
    yield Flag("use_cpu", "bool", False)
    yield Flag("no_cuda", "bool", False)
    yield Flag("local_rank", "int", -1)
    yield Flag("lora_r", "int", 8)
    yield Flag("lora_alpha", "number", 16)
    yield Flag("lora_dropout", "number", 0.05)
    yield Flag("lora_target_modules", "texts", ["q_proj", "v_proj"])
    yield Flag("q_lora", "bool", False)


def _restricted() -> Iterator[Flag]:
    adamw = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
    yield Flag("fp16", "bool", False, only=(False,), refusal=WITHOUT_FP16)
    yield Flag("optim", "text", "adamw_torch", only=adamw, refusal=f"only AdamW is there: {', '.join(adamw)}")
    yield Flag("adafactor", "bool", False, only=(False,), refusal="only AdamW is there; leave the flag out")
    for name in ("optim_args", "optim_target_modules"):
        yield Flag(name, "text", None, only=(None, ""), refusal="there are no more settings; leave it out")
    why = "parameters are cut by DeepSpeed; give --deepspeed a file with ZeRO-3 instead"
    yield Flag("fsdp", "text", "", only=("",), refusal=why)
    why = "samples are taken in random order; leave the flag out"
    yield Flag("train_sampling_strategy", "text", "random", only=("random",), refusal=why)
    why = "use --per_device_train_batch_size"
    yield Flag("per_gpu_train_batch_size", "int", None, only=(None,), refusal=why)
    why = (
        "a run begins with a new adapter, or goes on from the checkpoints in --output_dir; leave the flag out"
    )
    yield Flag("lora_weight_path", "text", "", only=("",), refusal=why)
    why = "Yuan 2.0's linear layers have no biases to train; use none"
    yield Flag("lora_bias", "text", "none", only=("none",), refusal=why)


_WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "every sample is prepared before training and read through memory maps": (
        "lazy_preprocess:bool dataloader_num_workers:int dataloader_prefetch_factor:int "
        "dataloader_pin_memory:bool=True dataloader_persistent_workers:bool remove_unused_columns:bool=True "
        "dispatch_batches:text split_batches:text accelerator_config:text "
        "dataloader_multiprocessing_context:text dataloader_in_order:bool=True"
    ),
    "rows are packed, and what is padded is padded on the right": (
        "padding_side:text group_by_length:bool length_column_name:text"
    ),
    "every sample of an epoch is used": "dataloader_drop_last:bool",
    "the order of the data comes from --seed": "data_seed:int full_determinism:bool",
    "the loss is the mean over the labelled tokens of the global batch": "average_tokens_across_devices:bool",
    "the model's code is this project's own": (
        "trust_remote_code:bool torch_compile:bool torch_compile_backend:text torch_compile_mode:text "
        "torchdynamo:text jit_mode_eval:bool use_ipex:bool use_liger_kernel:bool liger_kernel_config:text"
    ),
    "flash_attn is used where it is installed": "flash_attn:bool",
    "models are directories, nothing is downloaded or uploaded": (
        "cache_dir:text push_to_hub:bool hub_model_id:text hub_strategy:text hub_token:text "
        "hub_private_repo:bool hub_always_push:bool hub_revision:text push_to_hub_model_id:text "
        "push_to_hub_organization:text push_to_hub_token:text"
    ),
    "every step is logged": (
        "logging_first_step:bool logging_strategy:text logging_nan_inf_filter:bool=True logging_dir:text "
        "log_level:text log_level_replica:text log_on_each_node:bool=True disable_tqdm:bool run_name:text "
        "project:text trackio_space_id:text trackio_bucket_id:text trackio_static_space_id:text "
        "include_tokens_per_second:bool include_num_input_tokens_seen:text "
        "skip_memory_metrics:bool=True debug:text"
    ),
    "evaluation computes the loss over all held-out tokens": (
        "per_device_eval_batch_size:int per_gpu_eval_batch_size:int eval_accumulation_steps:int "
        "eval_delay:number eval_on_start:bool prediction_loss_only:bool include_inputs_for_metrics:bool "
        "include_for_metrics:texts eval_do_concat_batches:bool=True batch_eval_metrics:bool "
        "eval_use_gather_object:bool label_names:texts bf16_full_eval:bool fp16_full_eval:bool "
        "past_index:int use_legacy_prediction_loop:bool"
    ),
    "the lowest evaluation loss decides which step is best": (
        "load_best_model_at_end:bool metric_for_best_model:text greater_is_better:bool"
    ),
    "training is what this program does": "do_train:bool do_eval:bool do_predict:bool",
    "a run that is asked to end (SIGTERM) always writes a checkpoint first": "enable_jit_checkpoint:bool",
    "training keeps no keys and values": "use_cache:bool",
    "a run goes on from the newest complete checkpoint in --output_dir, and never from another run's": (
        "resume_from_checkpoint:text overwrite_output_dir:bool ignore_data_skip:bool "
        "restore_callback_states_from_checkpoint:bool"
    ),
    "checkpoints are safetensors with the optimizer's state, written once": (
        "save_safetensors:bool=True save_on_each_node:bool save_only_model:bool"
    ),
    "processes are torchrun's, and DeepSpeed exchanges gradients between them": (
        "ddp_find_unused_parameters:bool ddp_bucket_cap_mb:int ddp_broadcast_buffers:bool ddp_backend:text "
        "ddp_static_graph:bool ddp_timeout:int tpu_num_cores:int tpu_metrics_debug:bool use_mps_device:bool "
        "ray_scope:text mp_parameters:text parallelism_config:text fsdp_config:text fsdp_min_num_params:int "
        "fsdp_transformer_layer_cls_to_wrap:text sharded_ddp:text xpu_backend:text"
    ),
    "the batch is as it is given": "auto_find_batch_size:bool torch_empty_cache_steps:int",
    "the ZeRO stage decides how layers are computed again": (
        "gradient_checkpointing_kwargs:text activation_checkpointing_kwargs:text"
    ),
    "fp16 is not used": "fp16_opt_level:text half_precision_backend:text fp16_backend:text",
}
"""Reason to flags, each `name:kind` and, where the default is true, `=True`."""


def _without_effect() -> Iterator[Flag]:
    for why, flags in _WITHOUT_EFFECT.items():
        for written in flags.split():
            name, _, described = written.partition(":")
            kind, _, default = described.partition("=")
            value = bool(default) if kind == "bool" else None
            yield Flag(name, kind, value, no_effect=why)  # type: ignore[arg-type]


FLAGS: Final[Mapping[str, Flag]] = {
    flag.name: flag for flag in (*_mapped(), *_restricted(), *_without_effect())
}
LORA_FLAGS: Final = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_weight_path",
    "lora_bias",
    "q_lora",
)
"""Those of `train_lora.py` alone: one of them makes a run a LoRA run."""


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags that are given, by name, as `transformers.HfArgumentParser` reads them.

    Raises:
        UsageError: a flag is not FastChat's, or its value cannot be read; one line.
    """
    parser = _Parser(
        prog=PROGRAM,
        usage=f"torchrun ... -m {PROGRAM} --model_name_or_path MODEL --data_path DATA --output_dir DIR ...",
        description="Fine-tune Yuan 2.0 with the flags of the published recipe (docs/fastchat.md).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in FLAGS.values():
        _add(parser, flag)
    found = vars(parser.parse_args(list(arguments)))
    for flag in FLAGS.values():
        if flag.name in found and flag.only is not None and found[flag.name] not in flag.only:
            raise UsageError(f"--{flag.name} {found[flag.name]}: {flag.refusal}")
    missing = [name for name in ("model_name_or_path", "data_path", "output_dir") if not found.get(name)]
    if missing:
        raise UsageError(f"{', '.join(f'--{name}' for name in missing)}: required")
    return found


def without_effect(given: Iterable[str]) -> list[str]:
    """A sentence for each given flag that changes nothing, in the order of the command line."""
    flags = (FLAGS[name] for name in given)
    return [f"--{flag.name} has no effect: {flag.no_effect}" for flag in flags if flag.no_effect is not None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of usage, line and exit."""
        known = "; the flags are those of FastChat's train_yuan2.py and train_lora.py"
        raise UsageError(message + (known if message.startswith("unrecognized") else ""))


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    names, text = [f"--{flag.name}"], _help(flag)
    if "_" in flag.name:
        names.append(f"--{flag.name.replace('_', '-')}")
    if flag.kind == "bool":
        # `--bf16` alone means True.
        parser.add_argument(
            *names, dest=flag.name, type=_bool, nargs="?", const=True, metavar="BOOL", help=text
        )
        if flag.default is True:
            parser.add_argument(f"--no_{flag.name}", dest=flag.name, action="store_false", help=text)
    elif flag.kind == "texts":
        parser.add_argument(*names, dest=flag.name, nargs="+", metavar="NAME", help=text)
    else:
        reader: Any = {"int": int, "number": float, "text": str}[flag.kind]
        parser.add_argument(*names, dest=flag.name, type=reader, metavar=flag.kind.upper(), help=text)


def _help(flag: Flag) -> str:
    if flag.no_effect is not None:
        return f"no effect: {flag.no_effect}"
    if flag.only is not None:
        return f"{' or '.join(str(value) for value in flag.only if value is not None)} only: {flag.refusal}"
    return "" if flag.default in (None, []) else f"default {flag.default}"


def _bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
