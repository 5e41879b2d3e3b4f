"""Small inputs for the trainer: a tokenizer trained on the spot, a tiny random Yuan 2.0, conversations,
jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from yuan2_core.contract import TrainJob
from yuan2_core.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["wind", "rain", "snow", "river", "stone", "cloud", "light", "field", "horse", "paper", "north"]


def conversations(count: int) -> list[dict[str, Any]]:
    """FastChat records of one to three turns and quite different lengths."""
    return [_record(number) for number in range(count)]


def _record(number: int) -> dict[str, Any]:
    messages = []
    for turn in range(1 + number % 3):
        word = WORDS[(number + turn) % len(WORDS)]
        messages.append({"from": "human", "value": f"{word} {number} {turn}?" + " why" * (number % 5)})
        messages.append({"from": "gpt", "value": f"{word} is {number * 7 % 13}" + f", {word}" * (number % 4)})
    return {"id": f"r{number}", "conversations": messages}


def write_data(path: Path, count: int) -> Path:
    path.write_text(json.dumps(conversations(count)), encoding="utf-8")
    return path


def write_model(directory: Path, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A tiny random checkpoint in the published layout, with a tokenizer of its own.

    For a training in 4 bits `hidden` must be a multiple of 64 (ADR 10).
    """
    from yuan2_model import Yuan2Config, random_model, save_model

    directory.mkdir(parents=True, exist_ok=True)
    texts = [message["value"] for record in conversations(60) for message in record["conversations"]]
    tokenizer = train_tokenizer(texts, 400, directory / "tokenizer.model")
    tokenizer.save_pretrained(directory)
    config = Yuan2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        eod_token=tokenizer.eod_id,
        sep_token=tokenizer.sep_id,
        pad_token_id=tokenizer.eod_id,
        bos_token_id=tokenizer.eod_id,
        eos_token_id=tokenizer.eod_id,
    )
    save_model(random_model(config, seed), config, directory)
    return directory


_OF_CHECKPOINT = ("every_steps", "every_seconds", "keep")
_OF_DATASET = ("format", "files", "max_invalid_fraction", "eval_path", "eval_fraction")
_BESIDE_TRAINING = ("method", "objective", "deepspeed", "merge_adapter", "evaluation", "tensorboard")


def make_job(
    model: Path,
    data: Path,
    output: Path,
    *,
    processes: int = 1,
    stage: int = 2,
    port: int = 0,
    **training: Any,
) -> TrainJob:
    """A `TrainJob` for this machine's processors; `training` are fields of `Training` by their Python
    names."""
    checkpoint = {
        "every_steps": 1000,
        **{name: training.pop(name) for name in _OF_CHECKPOINT if name in training},
    }
    dataset = {name: training.pop(name) for name in _OF_DATASET if name in training}
    beside = {name: training.pop(name) for name in _BESIDE_TRAINING if name in training}
    fields = {"precision": "fp32", "max_length": 128, "learning_rate": 1e-3, "max_steps": 6, **training}
    return TrainJob.model_validate(
        {
            "name": "tiny",
            "namespace": "test",
            "uid": "uid",
            "attempt": 1,
            "model": {"size": "custom", "path": str(model)},
            "dataset": {"path": str(data), **dataset},
            "method": {"full": {}},
            **beside,
            "training": {name: value for name, value in fields.items() if value is not None},
            "stage": stage,
            "checkpoint": checkpoint,
            "output": str(output),
            "launch": {"nodes": 1, "processes_per_node": processes, "device": "cpu"},
            "progress_port": port or free_port(),
        }
    )


@dataclass
class Pod:
    """A trainer that runs as the pod's main process does."""

    process: subprocess.Popen[bytes]
    termination_log: Path
    log: Path

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    @property
    def termination(self) -> dict[str, Any]:
        return json.loads(self.termination_log.read_text())

    @property
    def output(self) -> str:
        return self.log.read_text()


def start_pod(job: TrainJob, directory: Path, environment: dict[str, str] | None = None) -> Pod:
    """Start `python -m yuan2_trainer` for a job; its files lie in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    job_file = directory / "job.json"
    job_file.write_text(job.to_json())
    log = directory / "log.txt"
    path = [str(REPOSITORY / part) for part in ("core", "trainer_image")]
    # Nothing of a pod's environment that the caller did not ask for.
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PET_", "MASTER_"))
    }
    command = [sys.executable, "-m", "yuan2_trainer", "--job", str(job_file)]
    termination_log = directory / "termination.json"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--termination-log", str(termination_log)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**inherited, "PYTHONPATH": os.pathsep.join(path), **(environment or {})},
        )
    return Pod(process, termination_log, log)


def run_pod(job: TrainJob, directory: Path, environment: dict[str, str] | None = None) -> tuple[int, Pod]:
    """Run a trainer to its end."""
    pod = start_pod(job, directory, environment)
    return pod.wait(), pod


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: one a step, and one an evaluation."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """Loss by step, after checking that no step is missing or double."""
    rows = [row for row in metrics(output) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]
