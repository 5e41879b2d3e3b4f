"""FastChat's flags as a `TrainJob`. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import ValidationError

from yuan2_core.contract import DatasetLocation, Launch, ModelLocation, TrainJob
from yuan2_core.document import Contract
from yuan2_core.sections import (
    INT_LIMIT,
    Checkpoint,
    DeepSpeed,
    Evaluation,
    LoRA,
    LossMode,
    Method,
    QLoRA,
    Schedule,
    TargetModule,
    Training,
)
from yuan2_trainer.fastchat.flags import FLAGS, LORA_FLAGS, without_effect
from yuan2_trainer.fastchat.zero_file import ZeroSettings
from yuan2_trainer.pod.outcome import JobError

NEVER: Final = INT_LIMIT
"""Steps, or checkpoints, that no run has."""
_LOSSES: Final[Mapping[str, LossMode]] = {
    "efficient_loss": "efficient",
    "last_response_loss": "last_response",
    "split_example_loss": "split_example",
}
_SCHEDULES: Final[Mapping[str, Schedule]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
_KWARGS: Final[Mapping[str, Mapping[str, str]]] = {
    "cosine_with_min_lr": {"min_lr": "min_learning_rate", "min_lr_rate": "min_learning_rate"},
    "warmup_stable_decay": {"num_decay_steps": "decay_steps"},
}
"""Keys of `--lr_scheduler_kwargs` that a schedule of transformers has, and their fields here."""

_FLAG_OF: Final[Mapping[str, str]] = {
    "epochs": "num_train_epochs",
    "max_length": "model_max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "label_smoothing": "label_smoothing_factor",
    "neftune_alpha": "neftune_noise_alpha",
    "min_learning_rate": "lr_scheduler_kwargs",
    "decay_steps": "lr_scheduler_kwargs",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
}
"""Fields of the job that have another name than their flag."""
_SAME_NAME: Final = (
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "tf32",
    "seed",
)
Section = TypeVar("Section", bound=Contract)


@dataclass(frozen=True)
class Mapped:
    """A job, and what its user should know of flags that changed nothing."""

    job: TrainJob
    notes: list[str]


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """All flags as FastChat's script has them."""
    return {name: given.get(name, flag.default) for name, flag in FLAGS.items()}


def map_flags(given: Mapping[str, Any], zero: ZeroSettings, launch: Launch) -> Mapped:
    """The job that a command line describes.

    Args:
        given: the flags on it.
        zero: what `--deepspeed FILE` says, or its defaults.
        launch: the processes that torchrun has started, and what they compute on.

    Raises:
        JobError: flags contradict each other, or ask for what this trainer cannot do.
    """
    flags = with_defaults(given)
    notes = [*without_effect(given), *zero.notes]
    method = _method(given, flags, zero)
    output = Path(flags["output_dir"]).absolute()
    job = TrainJob(
        name=output.name or "run",
        namespace="",
        uid="",
        attempt=1,
        model=ModelLocation(size="custom", path=_absolute(flags["model_name_or_path"])),
        dataset=DatasetLocation(
            path=_absolute(flags["data_path"]), eval_path=_eval_path(given, flags, notes)
        ),
        method=method,
        training=_training(flags, zero, notes),
        stage=zero.stage,
        deepspeed=DeepSpeed(
            stage=zero.stage,
            offload=zero.offload,
            overrides=zero.overrides,
            flops_profiler=zero.flops_profiler,
        ),
        checkpoint=_checkpoint(given, flags, notes),
        evaluation=Evaluation(every_steps=_eval_steps(flags)),
        output=str(output),
        tensorboard=_tensorboard(flags, notes),
        launch=launch,
    )
    if "logging_steps" in given and flags["logging_steps"] != 1:
        notes.append("--logging_steps has no effect: every step is logged")
    return Mapped(job, notes)


def loss_mode(flags: Mapping[str, Any]) -> LossMode:
    """The one loss that is True.

    Raises:
        JobError: none is, or more than one.
    """
    wanted = [name for name in _LOSSES if flags[name]]
    if len(wanted) == 1:
        return _LOSSES[wanted[0]]
    names = ", ".join(f"--{name}" for name in _LOSSES)
    found = " and ".join(f"--{name}" for name in wanted) or "none"
    raise JobError(f"exactly one of {names} must be True, found {found}; set one of them")


def _training(flags: Mapping[str, Any], zero: ZeroSettings, notes: list[str]) -> Training:
    schedule, warmup = _schedule(flags, notes)
    limited = flags["max_steps"] > 0
    fields = {
        **{name: flags[name] for name in _SAME_NAME},
        "gradient_checkpointing": flags["gradient_checkpointing"] or flags["activation_checkpointing"],
        **warmup,
        **_schedule_settings(flags),
        "label_smoothing": flags["label_smoothing_factor"],
        "neftune_alpha": flags["neftune_noise_alpha"] or 0.0,
        "loss": loss_mode(flags),
        "epochs": None if limited else flags["num_train_epochs"],
        "max_steps": flags["max_steps"] if limited else None,
        "max_length": flags["model_max_length"],
        "micro_batch_size": flags["per_device_train_batch_size"],
        "schedule": schedule,
        "precision": "bf16" if flags["bf16"] else "fp32",
        "fp32_gradients": zero.fp32_gradients,
    }
    return _checked(Training, fields)


def _schedule(flags: Mapping[str, Any], notes: list[str]) -> tuple[Schedule, dict[str, Any]]:
    """Schedule and warm-up as `transformers` combines them: steps before ratio, none with `constant`."""
    name, steps, ratio = flags["lr_scheduler_type"], flags["warmup_steps"], flags["warmup_ratio"]
    if name not in _SCHEDULES:
        raise JobError(f"--lr_scheduler_type {name}: known are {', '.join(_SCHEDULES)}")
    if name == "constant":
        if steps or ratio:
            notes.append(
                "a warm-up has no effect with --lr_scheduler_type constant; see constant_with_warmup"
            )
        return "constant", {"warmup_steps": 0}
    if steps > 0:
        if ratio:
            notes.append("--warmup_ratio has no effect beside --warmup_steps")
        return _SCHEDULES[name], {"warmup_steps": steps}
    return _SCHEDULES[name], {"warmup_ratio": ratio}


def _schedule_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `--lr_scheduler_kwargs` says beside the schedule's name: a JSON object."""
    text, name = flags["lr_scheduler_kwargs"], flags["lr_scheduler_type"]
    known = _KWARGS.get(name, {})
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise JobError(f"--lr_scheduler_kwargs {text}: not JSON ({error})") from error
    if not isinstance(found, dict) or not set(found) <= set(known):
        keys = ", ".join(known) or "no settings"
        raise JobError(f"--lr_scheduler_kwargs {text}: --lr_scheduler_type {name} has {keys} here")
    if name in _KWARGS and len(found) != 1:
        raise JobError(f"--lr_scheduler_type {name} needs one of {', '.join(known)} in --lr_scheduler_kwargs")
    rate = flags["learning_rate"]
    return {known[key]: value * rate if key == "min_lr_rate" else value for key, value in found.items()}


def _method(given: Mapping[str, Any], flags: Mapping[str, Any], zero: ZeroSettings) -> Method:
    if not any(name in given for name in LORA_FLAGS):
        return Method.model_validate({"full": {}})
    _check_targets(flags["lora_target_modules"])
    settings = {
        "r": flags["lora_r"],
        "alpha": flags["lora_alpha"],
        "dropout": flags["lora_dropout"],
        "target_modules": tuple(flags["lora_target_modules"]),
    }
    if not flags["q_lora"]:
        return Method(lora=_checked(LoRA, settings))
    if not flags["bf16"]:
        raise JobError("--q_lora True computes in bf16; add --bf16 True")
    if zero.stage == 3:
        raise JobError("--q_lora True: ZeRO-3 cannot cut 4-bit weights; give --deepspeed a file with ZeRO-2")
    return Method(qlora=_checked(QLoRA, settings))


def _check_targets(names: Sequence[str]) -> None:
    known = get_args(TargetModule)
    for name in names:
        if name not in known:
            raise JobError(f"--lora_target_modules {name}: Yuan 2.0 has {', '.join(known)}")


def _checkpoint(given: Mapping[str, Any], flags: Mapping[str, Any], notes: list[str]) -> Checkpoint:
    keep = flags["save_total_limit"]
    if keep is not None and keep < 1:
        raise JobError(f"--save_total_limit {keep}: one checkpoint at least is kept; give 1 or more")
    if flags["save_strategy"] == "no":
        notes.extend(
            f"--{name} has no effect with --save_strategy no"
            for name in ("save_steps", "save_total_limit")
            if name in given
        )
        return Checkpoint(every_steps=NEVER, every_seconds=NEVER, keep=1)
    if flags["save_strategy"] != "steps":
        raise JobError(
            f"--save_strategy {flags['save_strategy']}: checkpoints are written every --save_steps; "
            "give steps or no"
        )
    return Checkpoint(
        every_steps=_steps("save_steps", flags["save_steps"]), keep=NEVER if keep is None else keep
    )


def _evaluation_strategy(flags: Mapping[str, Any]) -> str | None:
    """None where the flag is not given: FastChat's script would not evaluate; a file is given to be used."""
    strategy: str | None = flags["eval_strategy"] or flags["evaluation_strategy"]
    if strategy not in (None, "no", "steps", "epoch"):
        raise JobError(f"--evaluation_strategy {strategy}: give no, steps or epoch")
    if strategy in ("steps", "epoch") and not flags["eval_data_path"]:
        raise JobError(f"--evaluation_strategy {strategy} needs --eval_data_path, or no instead")
    return strategy


def _eval_path(given: Mapping[str, Any], flags: Mapping[str, Any], notes: list[str]) -> str | None:
    strategy, path = _evaluation_strategy(flags), flags["eval_data_path"]
    if "eval_steps" in given and strategy != "steps":
        notes.append("--eval_steps has no effect without --evaluation_strategy steps")
    if not path:
        return None
    if strategy == "no":
        notes.append("--eval_data_path has no effect with --evaluation_strategy no")
        return None
    return _absolute(path)


def _eval_steps(flags: Mapping[str, Any]) -> int | None:
    if _evaluation_strategy(flags) != "steps":
        return None
    given = flags["eval_steps"]
    return _steps("eval_steps", given) if given else _steps("logging_steps", flags["logging_steps"])


def _tensorboard(flags: Mapping[str, Any], notes: list[str]) -> bool:
    known = ("none", "all", "tensorboard")
    others = [name for name in flags["report_to"] if name not in known]
    if others:
        notes.append(
            f"--report_to {' '.join(others)} has no effect: metrics.jsonl and tensorboard are written"
        )
    return any(name in ("all", "tensorboard") for name in flags["report_to"])


def _absolute(path: str) -> str:
    """So that the record of the run means the same elsewhere."""
    return str(Path(path).absolute())


def _steps(name: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise JobError(f"--{name} {value:g}: give a whole number of optimizer steps")
    return int(value)


def _checked(model: type[Section], fields: Mapping[str, Any]) -> Section:
    """A section of the job; a value out of its range is told with its flag."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        found = error.errors()[0]
        name = str(found["loc"][0])
        said = found["msg"].replace("Input should be", "give a value", 1)
        raise JobError(f"--{_FLAG_OF.get(name, name)} {found['input']}: {said}") from error
