"""SIGKILL in every phase of a run, at a moment and to a process drawn by chance: it ends as the unbroken one.

Bit by bit, in fp32. Real pods, started again as the operator does: the same job, the next attempt. The phase
that a pod is in is what it says of itself at `/progress`; where one is over before it was seen, the kill
comes in the next. `make soak-kill` draws new runs (`YUAN2_KILL_ROUNDS` of them), `YUAN2_KILL_SEED` repeats
one.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.pod_processes import ask, family, kill, ranks, wait_until_gone
from tests.support.training import Pod, make_job, metrics, start_pod
from yuan2_core.contract import EXIT_COMPLETE, EXIT_CRASHED, TrainJob

Train = Callable[..., Path]
Inputs = tuple[Path, Path]
SEED = int(os.environ.get("YUAN2_KILL_SEED") or 720979)
ROUNDS = int(os.environ.get("YUAN2_KILL_ROUNDS") or 1)
EARLY = ["preparing", "loading", "evaluating", "training", "saving"]
"""Phases that come again in each attempt, as long as steps are left."""
LATER = {"training", "evaluating", "saving", "exporting"}
OVER = {"preparing": {"loading", *LATER}, "loading": LATER}
"""What shows that a phase is over for this attempt: data that are in the cache already take a moment."""
TARGETS = ["rank", "launcher", "pod"]
STEPS = 40
SETTINGS: dict[str, Any] = {
    "processes": 2,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "every_steps": 1,
    "keep": 2,
    "learning_rate": 1e-2,
    "eval_fraction": 0.3,
    "evaluation": {"every_steps": 2, "sample_answers": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": {"lora": {"dropout": 0.1}}, "merge_adapter": True},
}
"""Exporting an adapter merges it as well."""
LOOKS = 4
"""A kill comes at most so many looks after the first that saw the phase."""


@dataclass(frozen=True)
class Kill:
    phase: str
    target: str
    looks: int


def plan(seed: int) -> tuple[str, int, list[Kill]]:
    """Method, ZeRO stage, and one kill a phase: the early ones in any order, then within the export."""
    draw = random.Random(seed)
    phases = [*draw.sample(EARLY, len(EARLY)), "exporting"]
    kills = [Kill(phase, draw.choice(TARGETS), draw.randrange(LOOKS)) for phase in phases]
    return draw.choice(sorted(METHODS)), draw.choice([0, 2, 3]), kills


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_that_is_killed_in_every_phase_ends_as_the_unbroken_one(
    trained: Train, inputs: Inputs, tmp_path: Path, number: int
) -> None:
    seed = SEED + number  # no parameter: each worker of pytest-xdist draws its own
    method, stage, kills = plan(seed)
    print(f"YUAN2_KILL_SEED={seed}: {method}, ZeRO {stage}, {kills}")
    changes = {**SETTINGS, **METHODS[method], "stage": stage}
    output = tmp_path / "output"
    for attempt, wanted in enumerate(kills, start=1):
        job = make_job(*inputs, output, **changes).model_copy(update={"attempt": attempt})
        pod = start(job, tmp_path / f"attempt-{attempt}")
        strike(wanted, job, pod)
    job = make_job(*inputs, output, **changes).model_copy(update={"attempt": len(kills) + 1})
    last = start(job, tmp_path / "last")
    assert last.wait(300) == EXIT_COMPLETE, last.output
    assert_same_end(output, trained(**changes))


def start(job: TrainJob, directory: Path) -> Pod:
    return start_pod(job, directory, {"OMP_NUM_THREADS": "1"})


def strike(wanted: Kill, job: TrainJob, pod: Pod) -> None:
    """Kill what is wanted in the phase that is wanted, and see all of the pod end by itself."""
    seen = 0
    for state in states(job, pod):
        seen += state == wanted.phase
        if (state == wanted.phase and seen > wanted.looks) or state in OVER.get(wanted.phase, ()):
            break
    if pod.process.poll() is not None:
        return  # complete before the phase was seen
    members = family(pod.process.pid)
    victims = {"rank": ranks(pod)[-1:] or members[-1:], "launcher": members[:1], "pod": members}[
        wanted.target
    ]
    kill(victims)
    code = pod.wait(120)
    expected = -9 if pod.process.pid in victims else EXIT_CRASHED
    # An export of this size may end between the last look and the signal.
    too_late = wanted.phase == "exporting" and code == EXIT_COMPLETE
    assert code == expected or too_late, (wanted, code, pod.output)
    wait_until_gone(members)


def states(job: TrainJob, pod: Pod) -> Iterator[str]:
    """What the pod says it does, look by look, from its first answer on."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if pod.process.poll() is not None:
            assert pod.process.returncode == EXIT_COMPLETE, pod.output
            return
        try:
            yield json.loads(ask(job, "/progress"))["state"]
        except OSError:
            time.sleep(0.002)
    raise TimeoutError(pod.output)


def assert_same_end(output: Path, unbroken: Path) -> None:
    """The same numbers in every row, each once and in order, and the same weights in all that is exported."""
    timeless = ("step", "loss", "gradNorm", "learningRate", "tokens", "labelledTokens", "epoch", "evalLoss")
    found, expected = (
        [{name: row[name] for name in timeless if name in row} for row in metrics(one)]
        for one in (output, unbroken)
    )
    assert found == expected
    files = sorted(path.relative_to(unbroken) for path in unbroken.glob("*/*.safetensors"))
    assert files
    assert files == sorted(path.relative_to(output) for path in output.glob("*/*.safetensors"))
    for file in files:
        weights = load_file(unbroken / file)
        for name, tensor in load_file(output / file).items():
            assert torch.equal(tensor, weights[name]), (file, name)
    assert not list(output.glob("**/*.partial")), "half-written files are left"
