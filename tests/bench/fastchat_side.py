"""FastChat's side of the benchmarks, from this one: `tests.bench.fastchat_data` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.machine import ROOT
from yuan2_core.special_tokens import SPECIAL_TOKENS

PROGRAM = Path(__file__).with_name("fastchat_data.py")
PYTHON = ROOT / ".venv-fastchat" / "bin" / "python"
"""Of FastChat's own environment, with what its documents pin: `make .venv-fastchat/.ok`."""


@dataclass
class FastChat:
    """Its data set of one file of records, as `split_example` is trained on."""

    process: subprocess.Popen[str]
    root: Path

    def tokenise(self, indices: Sequence[int]) -> float:
        """Seconds of making samples that the lazy data set has not seen."""
        self._ask(task="forget")
        return self._ask(task="samples", indices=list(indices))

    def batches(self, indices: Sequence[int], size: int, *, cached: bool) -> tuple[float, Any]:
        """Seconds of fetching these samples in batches, tokenised for it or from the cache; and the batches,
        which are dicts of tensors."""
        if cached:
            self._ask(task="samples", indices=list(indices))
        else:
            self._ask(task="forget")
        file = self.root / "batches.pt"
        took = self._ask(task="batches", indices=list(indices), size=size, file=str(file))
        import torch

        return took, torch.load(file, weights_only=True)

    def _ask(self, **task: Any) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"FastChat's side ended with code {self.process.wait()}: see what it printed")
        return line.strip()

    def wait_ready(self) -> None:
        """Imports and the file are behind it."""
        while self._line() != "ready":
            pass


@contextlib.contextmanager
def fastchat(records: Path, tokenizer: Path, length: int, root: Path) -> Iterator[FastChat]:
    """FastChat over a file of its records; `root` is an existing directory for what it hands over."""
    settings = {
        "tokenizer": str(tokenizer),
        "data": str(records),
        "length": length,
        "special_tokens": SPECIAL_TOKENS,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(PYTHON), str(PROGRAM), json.dumps(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        made = FastChat(process, root)
        try:
            made.wait_ready()
            made.tokenise(range(4))  # the first samples are slower
            yield made
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=30)


def record(turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A FastChat record of questions and answers."""
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "", "conversations": messages}
