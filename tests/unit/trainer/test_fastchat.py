"""FastChat's command line, flag by flag."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan2_core.conflicts import job_conflicts
from yuan2_core.contract import Launch, TrainJob
from yuan2_trainer.fastchat.flags import FLAGS, LORA_FLAGS, UsageError, parse, without_effect
from yuan2_trainer.fastchat.mapping import NEVER, Mapped, map_flags, with_defaults
from yuan2_trainer.fastchat.process import Place, main, read_command_line
from yuan2_trainer.fastchat.zero_file import ZeroSettings, map_zero_file, read_zero_file
from yuan2_trainer.model.deepspeed import ZERO_2, engine_config
from yuan2_trainer.pod.outcome import JobError

ROOT = Path(__file__).parents[3]
PUBLISHED = json.loads((ROOT / "tests/golden/recipe/published.json").read_text())
EIGHT = Launch(nodes=1, processes_per_node=8, device="cuda")
LEAST = "--model_name_or_path m --data_path d --output_dir o --split_example_loss True"
ZERO_FILE: dict[str, Any] = {
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "overlap_comm": False,
        "contiguous_gradients": True,
    },
    "bf16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
    "flops_profiler": {
        "enabled": True,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
"""Settings of the published recipe's ZeRO-2 file."""
FULL = (
    "--model_name_or_path /models/yuan --trust_remote_code True --data_path ./data.json --bf16 True "
    "--output_dir /out/full --num_train_epochs 3 --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --evaluation_strategy no "
    "--save_strategy steps --save_steps 1200 --save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. "
    "--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 1024 "
    "--gradient_checkpointing True --lazy_preprocess True --efficient_loss False --split_example_loss True "
    "--last_response_loss False"
)
"""Flags of the published full fine-tuning, but for --deepspeed."""
LORA = (
    "--model_name_or_path m --trust_remote_code True --data_path d --bf16 True --output_dir /out/lora "
    "--num_train_epochs 3 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
    "--gradient_accumulation_steps 16 --evaluation_strategy no --save_strategy steps --save_steps 1200 "
    "--save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 "
    "--lr_scheduler_type cosine --logging_steps 1 --model_max_length 512 --gradient_checkpointing True "
    "--lazy_preprocess True --q_lora True --efficient_loss False --split_example_loss True "
    "--last_response_loss False"
)
"""Flags of the published QLoRA sample."""


def mapped(line: str, zero: ZeroSettings | None = None, launch: Launch = EIGHT) -> Mapped:
    return map_flags(parse(line.split()), zero or ZeroSettings(), launch)


def job(line: str) -> TrainJob:
    return mapped(line).job


def zero_settings(config: dict[str, Any], line: str = LEAST) -> ZeroSettings:
    return map_zero_file("f.json", config, with_defaults(parse(line.split())), ranks=8)


def zero_with(**changes: Any) -> dict[str, Any]:
    return {**ZERO_FILE, **changes}


def test_the_published_command_is_the_published_recipe() -> None:
    zero = zero_settings(ZERO_FILE, FULL)
    made = mapped(FULL, zero)
    assert made.job.method.full is not None
    assert made.job.stage == 2
    assert made.job.deepspeed.overrides == {}
    assert made.job.deepspeed.flops_profiler
    training = made.job.training
    assert (training.loss, training.epochs, training.max_length) == ("split_example", 3.0, 1024)
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (4, 4)
    assert (training.learning_rate, training.warmup_ratio, training.schedule) == (2e-5, 0.03, "cosine")
    assert (training.precision, training.tf32, training.gradient_checkpointing) == ("bf16", True, True)
    assert (made.job.checkpoint.every_steps, made.job.checkpoint.keep) == (1200, 10)
    assert made.job.output == "/out/full"
    assert made.job.name == "full"
    config = engine_config(made.job)
    assert {key: config["zero_optimization"][key] for key in ZERO_2} == ZERO_2
    assert config["flops_profiler"] == PUBLISHED["deepspeed"]["flops_profiler"]
    assert [note.split()[0] for note in made.notes] == [
        "--trust_remote_code",
        "--per_device_eval_batch_size",
        "--lazy_preprocess",
    ]
    assert list(job_conflicts(made.job)) == []


def test_the_published_qlora_command_is_qlora_without_zero() -> None:
    made = job(LORA)
    assert made.method.qlora is not None
    assert made.method.lora is made.method.full is None
    assert (made.method.qlora.r, made.method.qlora.alpha, made.method.qlora.dropout) == (8, 16, 0.05)
    assert made.method.qlora.target_modules == ("q_proj", "v_proj")
    assert made.stage == 0
    assert (made.training.gradient_accumulation_steps, made.training.max_length) == (16, 512)
    assert made.training.tf32 is False


def test_what_is_not_given_is_as_in_fastchats_script() -> None:
    training = job(LEAST).training
    assert (training.max_length, training.epochs, training.micro_batch_size) == (512, 3.0, 8)
    assert (training.learning_rate, training.schedule, training.precision) == (5e-5, "linear", "fp32")
    assert (training.gradient_checkpointing, training.warmup_ratio, training.seed) == (False, 0.0, 42)
    assert job(LEAST).checkpoint.every_steps == 500
    assert job(LEAST).checkpoint.keep == NEVER
    assert not job(LEAST).tensorboard


def test_every_flag_of_transformers_is_known() -> None:
    from transformers import TrainingArguments

    names = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert names - set(FLAGS) == set()


@pytest.mark.parametrize(
    ("text", "meant"),
    [("True", True), ("true", True), ("1", True), ("y", True), ("False", False), ("no", False), ("", True)],
)
def test_booleans_are_read_as_fastchat_reads_them(text: str, meant: bool) -> None:
    assert parse([*LEAST.split(), "--bf16", *text.split()])["bf16"] is meant


def test_other_spellings_of_a_flag() -> None:
    line = f"{LEAST} --learning-rate=3e-4 --no_dataloader_pin_memory"
    found = parse(line.split())
    assert found["learning_rate"] == 3e-4
    assert found["dataloader_pin_memory"] is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{LEAST} --no_such_flag 1", "unrecognized arguments: --no_such_flag 1; the flags are those"),
        (f"{LEAST} --learn 1", "unrecognized arguments: --learn 1"),
        (f"{LEAST} --learning_rate fast", "argument --learning_rate/--learning-rate: invalid float value"),
        (f"{LEAST} --bf16 maybe", "'maybe' is neither True nor False"),
        ("--data_path d --output_dir o", "--model_name_or_path: required"),
        (f"{LEAST} --fp16 True", "--fp16 True: fp16 cannot train Yuan 2.0"),
        (f"{LEAST} --optim_args fast", "--optim_args fast: there are no more settings"),
        (f"{LEAST} --optim adafactor", "--optim adafactor: only AdamW is there"),
        (f"{LEAST} --fsdp full_shard", "--fsdp full_shard: parameters are cut by DeepSpeed"),
        (f"{LEAST} --lora_bias all", "--lora_bias all: Yuan 2.0's linear layers have no biases"),
    ],
)
def test_a_wrong_command_line_is_one_line(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model_name_or_path m --data_path d --output_dir o", "must be True, found none"),
        (f"{LEAST} --efficient_loss True", "found --efficient_loss and --split_example_loss"),
        (f"{LEAST} --lr_scheduler_type polynomial", "--lr_scheduler_type polynomial: known are"),
        (f"{LEAST} --save_strategy epoch", "--save_strategy epoch: checkpoints are written every"),
        (f"{LEAST} --save_steps 0.5", "--save_steps 0.5: give a whole number"),
        (f"{LEAST} --save_total_limit 0", "--save_total_limit 0: one checkpoint at least"),
        (f"{LEAST} --evaluation_strategy steps", "--evaluation_strategy steps needs --eval_data_path"),
        (f"{LEAST} --evaluation_strategy often", "--evaluation_strategy often: give no, steps or epoch"),
        (f"{LEAST} --num_train_epochs 0", "--num_train_epochs 0.0: give a value greater than 0"),
        (f"{LEAST} --lr_scheduler_kwargs [", "--lr_scheduler_kwargs [: not JSON"),
        (f'{LEAST} --lr_scheduler_kwargs {{"min_lr":1}}', "--lr_scheduler_type linear has no settings here"),
        (f"{LEAST} --lr_scheduler_type warmup_stable_decay", "needs one of num_decay_steps"),
        (f"{LEAST} --label_smoothing_factor 1", "--label_smoothing_factor 1.0: give a value less than 1"),
        (f"{LEAST} --q_lora True", "--q_lora True computes in bf16; add --bf16 True"),
        (f"{LEAST} --lora_target_modules w", "--lora_target_modules w: Yuan 2.0 has q_proj"),
    ],
)
def test_flags_that_cannot_be_obeyed_are_refused(line: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        mapped(line)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--logging_steps 10", "--logging_steps has no effect: every step is logged"),
        ("--warmup_steps 5 --warmup_ratio 0.1", "--warmup_ratio has no effect beside --warmup_steps"),
        ("--lr_scheduler_type constant --warmup_ratio 0.1", "a warm-up has no effect"),
        ("--save_strategy no --save_steps 5", "--save_steps has no effect with --save_strategy no"),
        ("--eval_data_path e --evaluation_strategy no", "--eval_data_path has no effect"),
        ("--evaluation_strategy no --eval_steps 3", "--eval_steps has no effect"),
        ("--report_to wandb", "--report_to wandb has no effect"),
        ("--flash_attn True", "--flash_attn has no effect: flash_attn is used where it is installed"),
    ],
)
def test_a_flag_without_effect_is_named(flags: str, note: str) -> None:
    assert any(found.startswith(note) for found in mapped(f"{LEAST} {flags}").notes)


def test_the_page_shows_what_its_command_prints() -> None:
    page = (ROOT / "docs/fastchat.md").read_text("utf-8")
    command = page.split("-m yuan2_trainer.fastchat ", 1)[1].split("```")[0]
    given = parse(shlex.split(command.replace("\\\n", " ")))
    shown = [line for line in page.splitlines() if line.startswith("yuan2_trainer.fastchat: --")]
    assert shown == [
        f"yuan2_trainer.fastchat: {note}" for note in map_flags(given, ZeroSettings(), EIGHT).notes
    ]


def test_help_says_what_each_flag_does_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no effect: every step is logged" in said
    assert "--model_max_length INT, --model-max-length INT default 512" in said


def test_schedules_and_lengths() -> None:
    def training(flags: str) -> Any:
        return job(f"{LEAST} {flags}").training

    assert training("--max_steps 7").max_steps == 7
    assert training("--max_steps 7").epochs is None
    assert training("--warmup_steps 5").warmup_steps == 5
    assert training("--lr_scheduler_type constant_with_warmup --warmup_ratio 0.1").warmup_ratio == 0.1
    constant = training("--lr_scheduler_type constant --warmup_ratio 0.1")
    assert (constant.schedule, constant.warmup_steps, constant.warmup_ratio) == ("constant", 0, None)
    assert training("--max_grad_norm 0").max_grad_norm == 0
    floor = training('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}')
    assert (floor.schedule, floor.min_learning_rate) == ("cosine", 1e-6)
    share = training('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.5}')
    assert share.min_learning_rate == share.learning_rate / 2
    wsd = training('--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":9}')
    assert (wsd.schedule, wsd.decay_steps) == ("wsd", 9)


def test_optimizer_and_noise() -> None:
    flags = "--adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6 --label_smoothing_factor 0.1"
    made = job(f"{LEAST} {flags} --neftune_noise_alpha 5").training
    assert (made.adam_beta1, made.adam_beta2, made.adam_epsilon) == (0.8, 0.95, 1e-6)
    assert (made.label_smoothing, made.neftune_alpha) == (0.1, 5)


def test_evaluation() -> None:
    def of(flags: str) -> tuple[str | None, int | None]:
        made = job(f"{LEAST} {flags}")
        return made.dataset.eval_path, made.evaluation.every_steps

    assert of("--eval_data_path /e") == ("/e", None)
    assert of("--eval_data_path /e --evaluation_strategy epoch") == ("/e", None)
    assert of("--eval_data_path /e --eval_strategy steps --eval_steps 50") == ("/e", 50)
    assert of("--eval_data_path /e --evaluation_strategy steps --logging_steps 20") == ("/e", 20)
    assert of("--eval_data_path /e --evaluation_strategy no") == (None, None)


def test_paths_mean_the_same_elsewhere() -> None:
    made = job(f"{LEAST} --eval_data_path e.json")
    here = Path.cwd()
    assert made.model.path == str(here / "m")
    assert (made.dataset.path, made.dataset.eval_path) == (str(here / "d"), str(here / "e.json"))
    assert made.output == str(here / "o")


def test_lora_flags_make_a_lora_run() -> None:
    line = f"{LEAST} --lora_r 4 --lora_alpha 32 --lora_target_modules q_proj k_proj down_proj"
    lora = job(line).method.lora
    assert lora is not None
    assert (lora.r, lora.alpha, lora.target_modules) == (4, 32, ("q_proj", "k_proj", "down_proj"))
    everything = job(f"{LEAST} --lora_target_modules all-linear").method.lora
    assert everything is not None
    assert len(everything.target_modules) == 7
    assert job(f"{LEAST} --q_lora False").method.lora is not None
    assert job(LEAST).method.full is not None


SAMPLES = {"bool": ["True"], "int": ["3"], "number": ["3"], "text": ["x"], "texts": ["a", "b"]}


@settings(max_examples=60)
@given(st.sets(st.sampled_from([flag.name for flag in FLAGS.values() if flag.no_effect]), max_size=8))
def test_flags_without_effect_change_no_job_and_are_all_named(names: set[str]) -> None:
    arguments = LEAST.split()
    for name in sorted(names):
        arguments += [f"--{name}", *SAMPLES[FLAGS[name].kind]]
    made = map_flags(parse(arguments), ZeroSettings(), EIGHT)
    assert made.job == job(LEAST)
    assert {note.split()[0].removeprefix("--") for note in made.notes} == names


@given(st.sampled_from(sorted(FLAGS)))
def test_a_flag_given_with_its_default_changes_no_job(name: str) -> None:
    default = FLAGS[name].default
    if default is None or default in ("", []) or name in LORA_FLAGS:
        return
    words = [str(word) for word in default] if isinstance(default, list) else [str(default)]
    if name == "split_example_loss":
        words = ["True"]
    given_line = [*LEAST.split(), f"--{name}", *words]
    assert map_flags(parse(given_line), ZeroSettings(), EIGHT).job == job(LEAST)


def test_notes_are_sentences_with_their_flag() -> None:
    quiet = [name for name, flag in FLAGS.items() if flag.no_effect is not None]
    for note in without_effect(quiet):
        assert note.startswith("--")
        assert " has no effect: " in note


def test_a_zero_3_file_with_offload_is_mapped() -> None:
    config = zero_with(
        zero_optimization={
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": False},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 1e6,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        flops_profiler={"enabled": False, "profile_step": 4},
        steps_per_print=2000,
        wall_clock_breakdown=False,
        activation_checkpointing={"partition_activations": True},
    )
    zero = zero_settings(config)
    assert (zero.stage, zero.offload, zero.flops_profiler) == (3, "parameters", False)
    assert zero.overrides == {
        "steps_per_print": 2000,
        "zero_optimization": {"stage3_prefetch_bucket_size": 1e6, "offload_param": {"pin_memory": False}},
    }
    assert [note.split("f.json: ")[1].split()[0] for note in zero.notes] == [
        "activation_checkpointing",
        "stage3_gather_16bit_weights_on_model_save",
    ]
    made = mapped(LEAST, zero).job
    assert list(job_conflicts(made)) == []
    assert engine_config(made)["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "is 2, --per_device_train_batch_size says 8"),
        ({"train_batch_size": 16}, "train_batch_size is 16, batch size, accumulation steps and processes"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, --max_grad_norm says 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, --bf16 says false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but fp16 cannot train"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is Lion, but only AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "lr is 1.0, --learning_rate says 5e-05"),
        ({"scheduler": {"type": "WarmupLR"}}, "decided by --lr_scheduler_type"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4; give 0, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            'offload_optimizer.device is "nvme"; give cpu or none',
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "without ZeRO there is nothing to offload",
        ),
    ],
)
def test_a_file_that_contradicts_a_flag_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        zero_settings(zero_with(**changes))
    assert "--deepspeed f.json: " in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_agrees_or_says_auto_is_taken() -> None:
    agreeing = {
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 64,
        "gradient_clipping": 1,
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8}},
    }
    assert zero_settings(zero_with(**agreeing)) == zero_settings(ZERO_FILE)
    one = zero_settings(zero_with(zero_optimization={"stage": 1}))
    assert one.stage == 2
    assert "ZeRO-1 is trained as ZeRO-2" in one.notes[0]


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"data_types": {"grad_accum_dtype": "fp32"}}, True),
        ({"communication_data_type": "fp32"}, True),
        ({"data_types": {"grad_accum_dtype": "auto"}, "communication_data_type": "bf16"}, False),
    ],
)
def test_a_file_may_ask_for_gradients_in_fp32(section: dict[str, Any], wanted: bool) -> None:
    zero = zero_settings({"zero_optimization": {"stage": 2}, **section})
    assert zero.fp32_gradients is wanted
    assert (zero.overrides, zero.notes) == ({}, [])


def test_a_file_that_asks_for_gradients_in_fp16_is_refused() -> None:
    with pytest.raises(JobError, match=r'grad_accum_dtype is "fp16"; give fp32, or leave it out'):
        zero_settings({"data_types": {"grad_accum_dtype": "fp16"}})


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for content, message in ((None, "No such file"), ("{", "is not JSON"), ("[]", "is no JSON object")):
        path = tmp_path / "zero.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(JobError, match=message):
            read_zero_file(str(path))


def test_the_place_among_the_ranks_is_torchruns(tmp_path: Path) -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    place = Place.of(environment)
    assert (place.node, place.local_rank, place.under_torchrun) == (1, 1, False)
    assert Place.of({}) == Place(0, 0, 1, 1, under_torchrun=False)
    line = f"{LEAST} --use_cpu True --model_name_or_path {tmp_path}"
    launch = read_command_line(line.split(), place).job.launch
    assert (launch.nodes, launch.processes_per_node, launch.device) == (2, 4, "cpu")


def test_checkpoints_of_transformers_trainer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1200").mkdir()
    (tmp_path / "checkpoint-1200" / "trainer_state.json").write_text("{}")
    line = f"{LEAST} --output_dir {tmp_path} --model_name_or_path {tmp_path}"
    with pytest.raises(JobError, match="checkpoint-1200 was written by transformers' Trainer"):
        read_command_line(line.split(), Place.of({}))


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        ("--no_such_flag 1", 2, "unrecognized arguments"),
        ("--efficient_loss True", 78, "exactly one of"),
        ("", 78, "--model_name_or_path m: no such directory; nothing is downloaded"),
        ("--deepspeed /no/such/file", 78, "No such file or directory"),
        ("--model_max_length 4", 78, "--model_max_length 4: give a value greater than or equal to 8"),
    ],
)
def test_errors_are_one_line_on_standard_error(
    flags: str, exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LEAST.split(), *flags.split()]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("yuan2_trainer.fastchat: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
