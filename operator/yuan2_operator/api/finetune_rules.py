"""CEL rules of a Yuan2FineTune: what the schema alone cannot say, each with the sentence a user reads."""

from __future__ import annotations

from typing import Any

from yuan2_core import conflicts
from yuan2_core.presets import DEFAULT_ZERO_STAGE, PRESETS, zero_stage
from yuan2_core.resuming import FREE_TRAINING
from yuan2_core.sections import OUTSIDE, Training
from yuan2_operator.api.common import NAME_RULES
from yuan2_operator.api.pods import gpu_rules
from yuan2_operator.api.schema import rules
from yuan2_operator.constants import TRAINER_RESERVED_ENV

ONE_METHOD = rules(
    ("[has(self.full), has(self.lora), has(self.qlora)].exists_one(given, given)", conflicts.ONE_METHOD)
)
ONE_OBJECTIVE = rules(
    (
        "[has(self.sft), has(self.dpo), has(self.orpo), has(self.kto)].filter(given, given).size() <= 1",
        conflicts.ONE_OBJECTIVE,
    )
)
TRAINING = rules(
    ("!(has(self.epochs) && has(self.maxSteps))", conflicts.ONE_LENGTH),
    ("!(has(self.warmupRatio) && has(self.warmupSteps))", conflicts.ONE_WARMUP),
    ("!(has(self.decayRatio) && has(self.decaySteps))", conflicts.ONE_DECAY),
)
DATASET = rules(
    ("!(has(self.evalSource) && self.evalFraction > 0.0)", conflicts.ONE_HELD_OUT),
    ("size(self.files) == 0 || self.format == 'auto'", conflicts.FORMAT_OF_FILES),
    ("size(self.files) == 0 || !has(self.source.configMap)", conflicts.FILES_OF_CONFIG_MAP),
)
FILES_BELOW = rules(
    (
        "self.all(file, file.path == '.' || file.path.split('/').all(part, !(part in ['', '.', '..'])))",
        OUTSIDE,
    )
)


def one_source(field: str) -> dict[str, Any]:
    """The rule of a place where conversations are."""
    return rules(
        (
            "has(self.persistentVolumeClaim) != has(self.configMap)",
            f"{field}: name exactly one of persistentVolumeClaim and configMap",
        )
    )


ONE_DEVICE = rules(
    (
        "!(has(self.gpusPerWorker) && has(self.processesPerWorker))",
        "workers.gpusPerWorker and workers.processesPerWorker exclude each other: "
        "a process a GPU, or processes on CPU; remove one",
    ),
    (
        "has(self.gpusPerWorker) || has(self.processesPerWorker)",
        "workers: give gpusPerWorker, or processesPerWorker to train on CPU",
    ),
    *gpu_rules("workers"),
)
NO_RESERVED_ENV = rules(
    (
        f"self.all(variable, !(variable.name in {list(TRAINER_RESERVED_ENV)}))",
        "workers.env: MASTER_*, WORLD_SIZE, RANK, PYTHONUNBUFFERED and PET_* are set by the operator; "
        "remove them",
    )
)

QUEUED = rules(
    (
        "!has(self.priorityClass) || has(self.queueName) || (has(self.gang) && self.gang == 'volcano')",
        "scheduling.priorityClass orders the runs of a queue: give queueName, "
        "or use workers.priorityClassName",
    )
)

_CLAIM = "persistentVolumeClaim"
_MODEL = f"self.model.source.{_CLAIM}"
_OUTPUT = f"self.output.{_CLAIM}"
_LARGE = [size for size, preset in PRESETS.items() if preset.zero_stage == 3]
_STAGE = (
    "(has(self.deepspeed.stage) ? self.deepspeed.stage"
    f" : has(self.method.qlora) ? {zero_stage('2B', 'qlora')}"
    f" : self.model.size in {_LARGE} ? 3 : {DEFAULT_ZERO_STAGE})"
)
"""`presets.zero_stage` in CEL."""
_DORA = " || ".join(f"(has(self.method.{name}) && self.method.{name}.dora)" for name in ("lora", "qlora"))
_HELD_OUT = "(has(self.dataset.evalSource) || self.dataset.evalFraction > 0.0)"
_JUDGED = (
    "(has(self.evaluation.everySteps) || has(self.evaluation.earlyStoppingPatience)"
    " || (has(self.evaluation.sampleAnswers) && self.evaluation.sampleAnswers > 0))"
)
SPEC = rules(
    (
        f"{_OUTPUT}.claimName != {_MODEL}.claimName || ({_OUTPUT}.path != '.'"
        f" && {_OUTPUT}.path != {_MODEL}.path && !{_MODEL}.path.startsWith({_OUTPUT}.path + '/'))",
        "output: the path holds the model that training starts from and would overwrite it; "
        "choose another path or claim",
    ),
    ("!(has(self.method.full) && self.output.mergeAdapter)", conflicts.NO_ADAPTER),
    (f"!(has(self.method.qlora) && {_STAGE} == 3)", conflicts.QLORA_STAGE_3),
    ("!has(self.method.qlora) || self.training.precision == 'bf16'", conflicts.QLORA_PRECISION),
    (
        "self.training.gradientCheckpointing || self.training.gradientCheckpointingEvery == 1",
        conflicts.NOT_CHECKPOINTED,
    ),
    (
        "self.training.schedule == 'wsd' ||"
        " !(has(self.training.decayRatio) || has(self.training.decaySteps))",
        conflicts.ONLY_WSD,
    ),
    ("self.training.schedule != 'constant' || self.training.minLearningRate == 0.0", conflicts.RATE_STAYS),
    ("self.training.minLearningRate <= self.training.learningRate", conflicts.RATE_RISES),
    (
        "self.training.labelSmoothing == 0.0 ||"
        " !(has(self.objective.dpo) || has(self.objective.orpo) || has(self.objective.kto))",
        conflicts.SMOOTHED_ANSWERS,
    ),
    (f"!(({_DORA}) && {_STAGE} == 3)", conflicts.DORA_STAGE_3),
    (
        f"!self.training.fp32Gradients || self.training.precision == 'fp32' || {_STAGE} >= 2",
        conflicts.FP32_GRADIENTS,
    ),
    (f"self.deepspeed.offload != 'parameters' || {_STAGE} == 3", conflicts.OFFLOAD_PARAMETERS),
    (f"self.deepspeed.offload != 'optimizer' || {_STAGE} >= 2", conflicts.OFFLOAD_OPTIMIZER),
    (f"!{_JUDGED} || {_HELD_OUT}", conflicts.NOTHING_HELD_OUT),
)
"""Every field that they read has a default or is asked for with `has`. Rules that need defaults stand here: a
section that may be left out is `{}` when the CRD itself is checked, with no defaults in it yet."""

_NO_RUN = "(!has(oldSelf.status) || !has(oldSelf.status.attempt) || oldSelf.status.attempt < 1)"
_PAUSED = "self.spec.runPolicy.suspend"
_WAY_OUT = "create another Yuan2FineTune, or delete this one first"
_FIXED_SECTIONS = ("model", "dataset", "method", "objective", "deepspeed", "output")
_FIXED_TRAINING = tuple(
    str(field.alias) for field in Training.model_fields.values() if field.alias not in FREE_TRAINING
)


def _same(field: str) -> str:
    """Whether a field of `training` is what it was, absent or present."""
    new, old = f"self.spec.training.{field}", f"oldSelf.spec.training.{field}"
    return f"(has({new}) ? has({old}) && {new} == {old} : !has({old}))"


def _fixed_section(section: str) -> tuple[str, str]:
    return (
        f"{_NO_RUN} || self.spec.{section} == oldSelf.spec.{section}",
        f"spec.{section} cannot change once training has begun: its checkpoints depend on it; {_WAY_OUT}",
    )


def _fixed_while_running(section: str) -> tuple[str, str]:
    return (
        f"{_NO_RUN} || {_PAUSED} || self.spec.{section} == oldSelf.spec.{section}",
        f"spec.{section} can change only while spec.runPolicy.suspend is true: set it first",
    )


ROOT_RULES = rules(
    *NAME_RULES,
    *(_fixed_section(section) for section in _FIXED_SECTIONS),
    (
        f"{_NO_RUN} || ({' && '.join(map(_same, _FIXED_TRAINING))})",
        f"spec.training cannot change once training has begun, but for {', '.join(FREE_TRAINING)}: its "
        f"checkpoints depend on it; {_WAY_OUT}",
    ),
    _fixed_while_running("training"),
    _fixed_while_running("workers"),
    _fixed_while_running("scheduling"),
    _fixed_while_running("checkpoint"),
    _fixed_while_running("evaluation"),
)
"""Names, and transitions: before the first attempt everything may be corrected, runPolicy at any time."""
