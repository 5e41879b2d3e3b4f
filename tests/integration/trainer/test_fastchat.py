"""FastChat's command line on real ranks, beside the same job through the normal door."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.ports import free_port
from tests.support.ranks import run_processes, start_processes, train
from tests.support.training import REPOSITORY, losses, metrics, write_model
from yuan2_trainer.fastchat.flags import FLAGS, LORA_FLAGS
from yuan2_trainer.pod.launcher import load_job

Train = Callable[..., Path]
MODULE = "yuan2_trainer.fastchat.process"
ZERO_FILE = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": False},
    "bf16": {"enabled": "auto"},
    "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": None},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
LINE = (
    "--trust_remote_code True --bf16 False --num_train_epochs 1 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --evaluation_strategy no --save_strategy steps --save_steps 2 "
    "--save_total_limit 2 --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 "
    "--lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 128 "
    "--gradient_checkpointing True --lazy_preprocess True --efficient_loss False "
    "--split_example_loss True --last_response_loss False"
)


def command_line(inputs: tuple[Path, Path], output: Path, more: str = "") -> list[str]:
    model, data = inputs
    paths = ["--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    return [*paths, *LINE.split(), *more.split()]


def torchrun(arguments: list[str], processes: int) -> list[str]:
    launched = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*launched, f"--master-port={free_port()}", "-m", "yuan2_trainer.fastchat", *arguments]


def environment() -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PET_", "MASTER_"))
    }
    path = os.pathsep.join(str(REPOSITORY / part) for part in ("core", "trainer_image"))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "model").glob("*.safetensors")))


def fastchat(arguments: list[str], directory: Path, processes: int = 1) -> list[int | None]:
    """Run the ranks in forked processes; their exit codes."""
    return run_processes(MODULE, arguments, directory, processes)


def test_torchrun_trains_as_the_normal_door_does(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    zero = tmp_path / "zero2.json"
    zero.write_text(json.dumps(ZERO_FILE))
    output = tmp_path / "fastchat"
    line = command_line(inputs, output, f"--deepspeed {zero}")
    done = subprocess.run(torchrun(line, 2), env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    named = [text for text in done.stderr.splitlines() if text.startswith("yuan2_trainer.fastchat: ")]
    assert [text.split()[1] for text in named] == ["--trust_remote_code", "--lazy_preprocess"]
    assert "DeepSpeed Flops Profiler" in done.stdout
    assert f"written to {output}/model" in done.stdout

    job = load_job(output / "job.json").model_copy(update={"output": str(tmp_path / "normal")})
    assert job.stage == 2
    assert job.launch.processes_per_node == 2
    train(job, tmp_path / "workspace")
    assert losses(output) == losses(tmp_path / "normal")
    expected = weights(tmp_path / "normal")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


def test_a_run_goes_on_from_the_checkpoints_in_its_output(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert fastchat(command_line(inputs, whole), tmp_path / "one") == [0]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "step-000013")
    (resumed / "job.json").unlink()
    assert fastchat(command_line(inputs, resumed), tmp_path / "two") == [0]
    log = (tmp_path / "two" / "rank-0.log").read_text()
    assert "going on from step-000012" in log
    assert losses(resumed) == losses(whole)

    shutil.rmtree(resumed / "model")
    another = write_model(tmp_path / "another", seed=1)
    assert fastchat(command_line((another, inputs[1]), resumed), tmp_path / "three") == [78]
    assert "the base model" in (tmp_path / "three" / "rank-0.log").read_text().splitlines()[-1]


def test_an_adapter_is_trained_and_evaluated(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "output"
    more = f"--lora_r 4 --lora_target_modules q_proj k_proj v_proj --eval_data_path {inputs[1]} --max_steps 4"
    line = command_line(inputs, output, more)
    line[line.index("--evaluation_strategy") + 1] = "steps"
    assert fastchat([*line, "--eval_steps", "2", "--report_to", "tensorboard"], tmp_path / "ranks", 2) == [
        0,
        0,
    ]
    rows = [row for row in metrics(output) if "evalLoss" in row]
    assert [row["step"] for row in rows][-2:] == [2, 4]
    assert rows[-1]["evalLoss"] < rows[0]["evalLoss"]
    assert (output / "adapter" / "adapter_config.json").is_file()
    assert list((output / "tensorboard").iterdir())


def test_sigterm_writes_a_checkpoint_first(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "output"
    line = command_line(inputs, output, "--max_steps 100000 --save_strategy no")
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    (process,) = start_processes(MODULE, line, ranks, 1)
    end = time.monotonic() + 120
    while not ((output / "metrics.jsonl").is_file() and metrics(output)):
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = (ranks / "rank-0.log").read_text()
    assert process.exitcode == 75, said
    assert "asked to end: checkpoint written at step" in said
    assert list((output / "checkpoints").glob("step-*/manifest.json"))


def test_a_wrong_command_line_is_said_once(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    line = command_line(inputs, tmp_path / "o", "--efficient_loss True")
    assert fastchat(line, tmp_path / "ranks") == [78]
    said = (tmp_path / "ranks" / "rank-0.log").read_text()
    assert said.count("error: exactly one of --efficient_loss") == 1
    missing = command_line((inputs[0], tmp_path / "no-data"), tmp_path / "o")
    assert fastchat(missing, tmp_path / "missing") == [78]
    assert "no-data" in (tmp_path / "missing" / "rank-0.log").read_text().splitlines()[-1]


def test_every_flag_of_fastchats_scripts_is_known_with_its_default() -> None:
    from fastchat.train import train_yuan2 as script

    for owner in (script.ModelArguments, script.DataArguments, script.TrainingArguments):
        for item in dataclasses.fields(owner):
            assert not item.init or item.name in FLAGS, item.name
    defaults = {item.name: item.default for item in dataclasses.fields(script.TrainingArguments)}
    for name in ("model_max_length", "learning_rate", "per_device_train_batch_size", "lr_scheduler_type"):
        assert FLAGS[name].default == getattr(defaults[name], "value", defaults[name])
    assert set(LORA_FLAGS) <= set(FLAGS)
