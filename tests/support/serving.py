"""The serving stack as a user runs it: real programs on ports of this machine, and a tiny model for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.ports import free_port
from tests.support.waiting import wait_for
from yuan2_core.contract import ApiJob, ServeJob, WorkerJob
from yuan2_core.engine import VllmOptions
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer

TEXTS = (
    "Who are you? I am Yuan, a small model for tests.",
    "What is the man doing? The man is in the garden.",
    "你是谁？我是源，一个用来测试的小模型。",
    "今天天气很好，我们去公园散步吧。",
    "1 + 1 = 2, 2 + 2 = 4, a < b > c",
)
CONTEXT = 256
VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling vLLM's sampler alone takes longer than all that the tests ask it."""
EAGER_VLLM = VllmOptions(engine_args={"enforce-eager": "true", "block-size": "32"})
BOOT_SECONDS = 300.0
"""torch and transformers take long to import when the machine is busy."""


def tiny_model(
    directory: Path,
    *,
    seed: int = 7,
    context: int = CONTEXT,
    endless: bool = False,
    hidden: int = 32,
    layers: int = 2,
    heads: int | None = None,
    spread: float = 0.3,
) -> Yuan2Tokenizer:
    """Write a random model with a tokenizer of its own in the published layout; a few hundred kilobytes.

    It has heads of 64 unless told otherwise, at least two. `spread` is the standard deviation of its weights.
    An `endless` one never says `<eod>` at temperature 0: its score is 0 and there is always a better one.
    """
    from yuan2_model import Yuan2Config, random_model, save_model

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(TEXTS, 420, directory)
    eod = tokenizer.eod_id
    config = Yuan2Config(
        vocab_size=448,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads or max(2, hidden // 64),
        max_position_embeddings=context,
        model_max_length=context,
        eod_token=eod,
        sep_token=tokenizer.sep_id,
        pad_token_id=eod,
        bos_token_id=eod,
        eos_token_id=eod,
        initializer_range=spread,
    )
    model = random_model(config, seed)
    if endless:
        rows = model.get_output_embeddings().weight.data
        # Rows beyond the tokenizer's have no text: FastChat's worker ends at one of them for ever.
        rows[eod] = rows[tokenizer.vocab_size :] = 0
    save_model(model, config, directory)
    return tokenizer


def serve_job(model: Path, controller_url: str, **changes: Any) -> ServeJob:
    """The job of a service on this machine; `changes` replace fields of its worker and API sections."""
    worker = {name: value for name, value in changes.items() if name in WorkerJob.model_fields}
    api = {name: value for name, value in changes.items() if name in ApiJob.model_fields}
    return ServeJob(
        name="alpaca",
        namespace="demo",
        uid="uid-1",
        served_name=changes.get("served_name", "yuan2"),
        model_path=str(model),
        worker=WorkerJob(
            **{
                "port": 1,
                "controller_url": controller_url,
                "device": "cpu",
                "precision": "fp32",
                **worker,
            }
        ),
        api=ApiJob(**{"port": 1, "controller_url": controller_url, **api}),
    )


@dataclass
class Program:
    """A process of the stack, its HTTP address and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def probe(self, path: str) -> bool:
        """Whether GET `path` answers 200. A program that has ended is an error."""
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        try:
            return httpx.get(self.url + path, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ready(self, path: str = "/readyz") -> Program:
        """Wait until GET `path` answers 200."""
        try:
            wait_for(f"{self.log.stem} {path}", lambda: self.probe(path), BOOT_SECONDS, every=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-3000:]}") from error
        return self

    def terminate(self, timeout: float = 30.0) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End it at once, as a lost node does."""
        self.process.kill()
        self.process.wait(10)


@dataclass
class Stack:
    """Programs that end together with the test."""

    directory: Path
    programs: list[Program] = field(default_factory=list)
    threads: int = 1
    """Of torch, in each program."""

    def controller(self, port: int | None = None) -> Program:
        """FastChat's own controller."""
        port = port or free_port()
        arguments = ["-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(port)]
        return self.run("controller", [*arguments, "--dispatch-method", "shortest_queue"], port)

    def worker(self, job: ServeJob) -> Program:
        """Our model worker, on a port of its own."""
        port = free_port()
        job = job.model_copy(update={"worker": job.worker.model_copy(update={"port": port})})
        address = f"http://127.0.0.1:{port}"
        arguments = ["-m", "yuan2_server", "worker", "--job", self.write(job), "--address", address]
        arguments += ["--termination-log", self.termination(port)]
        if job.worker.vllm is not None:
            return self.run("vllm-worker", arguments, port, EAGER, python=VLLM_PYTHON)
        return self.run("worker", arguments, port)

    def api(self, job: ServeJob, keys: Path | None = None) -> Program:
        """Our OpenAI-compatible API server, on a port of its own."""
        port = free_port()
        job = job.model_copy(update={"api": job.api.model_copy(update={"port": port})})
        arguments = ["-m", "yuan2_server", "api", "--job", self.write(job)]
        arguments += ["--termination-log", self.termination(port)]
        return self.run("api", [*arguments, "--keys", str(keys)] if keys else arguments, port)

    def fastchat_api(self, controller: Program, python: Path | None = None) -> Program:
        """FastChat's own API server, in the environment of `python` or this one."""
        port = free_port()
        arguments = ["-m", "fastchat.serve.openai_api_server", "--host", "127.0.0.1", "--port", str(port)]
        return self.run(
            "fastchat-api", [*arguments, "--controller-address", controller.url], port, python=python
        )

    def fastchat_worker(self, model: Path, controller: Program, limit: int, python: Path) -> Program:
        """FastChat's own model worker in the environment of `python`; it takes `limit` requests at once."""
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        arguments = ["-m", "fastchat.serve.model_worker", "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--worker-address", address, "--controller-address", controller.url]
        arguments += ["--model-path", str(model), "--model-names", "yuan2", "--conv-template", "yuan2"]
        arguments += ["--device", "cpu", "--dtype", "float32", "--limit-worker-concurrency", str(limit)]
        return self.run("fastchat-worker", arguments, port, python=python)

    def gated_page(self, controller: Program, keys: Path) -> Program:
        """FastChat's web page behind our gate."""
        port = free_port()
        arguments = ["-m", "yuan2_server", "web", "--port", str(port), "--page-port", str(free_port())]
        return self.run("web", [*arguments, "--controller-url", controller.url, "--keys", str(keys)], port)

    def write(self, job: ServeJob) -> str:
        """Write a job file and return its path."""
        path = self.directory / f"job-{len(self.programs)}.json"
        path.write_text(job.to_json(), encoding="utf-8")
        return str(path)

    def termination(self, port: int) -> str:
        """Where the program on a port leaves its termination message."""
        return str(self.directory / f"termination-{port}.json")

    def run(
        self,
        name: str,
        arguments: list[str],
        port: int,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> Program:
        """Start a Python program, of another environment if `python` says so; its output goes to a file."""
        own = self._environment() if python is None else {**self._environment(), "PYTHONPATH": ""}
        log = self.directory / f"{name}-{port}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(python or sys.executable), *arguments],
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env={**os.environ, **own, **(environment or {})},
            )
        program = Program(process, f"http://127.0.0.1:{port}", log)
        self.programs.append(program)
        return program

    def close(self) -> None:
        """End every program."""
        for program in self.programs:
            if program.process.poll() is None:
                program.process.kill()
        for program in self.programs:
            program.process.wait(10)

    def _environment(self) -> dict[str, str]:
        return {
            "FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "1",
            "FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "5",
            "LOGDIR": str(self.directory),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }


def read_termination(stack: Stack, program: Program) -> dict[str, Any]:
    """What a program left in its termination log."""
    port = int(program.url.rsplit(":", 1)[1])
    return dict(json.loads(Path(stack.termination(port)).read_text(encoding="utf-8")))
