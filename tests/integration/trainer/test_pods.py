"""Two pods under the environment of a PyTorchJob: progress, SIGTERM, a killed rank, and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.pod_processes import ask, ranks
from tests.support.ports import free_port
from tests.support.training import Pod, losses, make_job, start_pod
from yuan2_core.contract import Launch, TrainJob

Train = Callable[..., Path]
SETTINGS = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 80, "every_steps": 10}


def pods_of(job: TrainJob, directory: Path) -> list[Pod]:
    """Two pods of one process each; rank 0 comes late, as pods do."""
    port = free_port()
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(port),
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    pods = []
    for rank in (1, 0):
        environment = {**shared, "RANK": str(rank), "PET_NODE_RANK": str(rank)}
        pods.append(start_pod(job, directory / f"pod-{rank}", environment))
        time.sleep(0.5)
    return pods[::-1]


def wait_for_step(job: TrainJob, step: int, pods: list[Pod]) -> dict[str, Any]:
    """The first progress with at least so many steps done."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert all(pod.process.poll() is None for pod in pods), [pod.output for pod in pods]
        try:
            progress = json.loads(ask(job, "/progress"))
        except OSError:
            progress = {"step": 0, "state": "starting"}
        if progress["step"] >= step and progress["state"] == "training":
            return progress
        time.sleep(0.02)
    raise TimeoutError([pod.output for pod in pods])


def test_pods_survive_sigterm_and_a_killed_rank_and_end_as_the_unbroken_run(
    trained: Train, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    job = make_job(*inputs, output, **SETTINGS)
    job = job.model_copy(update={"launch": Launch(nodes=2, processes_per_node=1, device="cpu")})

    # A drained node: SIGTERM reaches one pod, both save and end as preempted.
    pods = pods_of(job, tmp_path / "first")
    progress = wait_for_step(job, 3, pods)
    assert progress["totalSteps"] == 80
    assert progress["samples"] == 49
    assert 'yuan2_train_total_steps{attempt="1",name="tiny"} 80.0' in ask(job, "/metrics")
    pods[1].process.terminate()
    assert [pod.wait() for pod in pods] == [75, 75], [pod.output for pod in pods]
    saved = pods[0].termination["progress"]["lastCheckpointStep"]
    assert saved >= 3
    assert [pod.termination["reason"] for pod in pods] == ["Preempted", "Preempted"]
    assert f"checkpoint written at step {saved} of 80" in pods[1].termination["message"]
    assert pods[1].termination["progress"]["step"] == saved

    # A rank that is killed takes the others down at once.
    pods = pods_of(job, tmp_path / "second")
    progress = wait_for_step(job, saved + 2, pods)
    assert progress["resumedFromStep"] == saved
    os.kill(ranks(pods[1])[0], signal.SIGKILL)
    killed_at = time.monotonic()
    assert [pod.wait() for pod in pods] == [1, 1], [pod.output for pod in pods]
    assert time.monotonic() - killed_at < 30
    assert "rank 1 was ended by signal 9" in pods[1].termination["message"]
    assert "lost contact with another rank" in pods[0].termination["message"]
    assert pods[0].termination["progress"]["state"] == "failed"

    # A rank that hangs is seen from outside, and one that does not notice a dead one is ended as well: it is
    # stopped here, as it would wait in a collective of NCCL.
    pods = pods_of(job, tmp_path / "third")
    wait_for_step(job, saved + 2, pods)
    os.kill(ranks(pods[0])[0], signal.SIGSTOP)
    ages = []
    for _ in range(3):
        time.sleep(1)
        ages.append(json.loads(ask(job, "/progress"))["lastStepAgeSeconds"])
    assert ages[2] - ages[1] > 0.9
    assert ages[1] - ages[0] > 0.9
    stopped, waiting = ask(job, "/stacks"), ask(job, "/stacks", job.progress_port + 1)
    assert stopped.startswith("=== rank 0 (pid ")
    assert "the kernel says of it: T (stopped)" in stopped
    assert waiting.startswith("=== rank 1 (pid ")
    assert re.search(r"Current thread .*\n(  File .*\n)*  File .*/train/loop.py", waiting), waiting
    os.kill(ranks(pods[1])[0], signal.SIGKILL)
    killed_at = time.monotonic()
    assert [pod.wait() for pod in pods] == [1, 1], [pod.output for pod in pods]
    assert time.monotonic() - killed_at < 30
    assert "lost contact with another rank: a rank of pod 1 ended" in pods[0].termination["message"]

    # The last attempt ends as if nothing had happened.
    pods = pods_of(job, tmp_path / "fourth")
    assert [pod.wait(300) for pod in pods] == [0, 0], [pod.output for pod in pods]
    assert pods[0].termination["reason"] == "Complete"
    assert pods[0].termination["progress"]["step"] == 80
    unbroken = trained(**SETTINGS, processes=2)
    assert losses(output) == losses(unbroken)
    expected = load_file(unbroken / "model" / "model.safetensors")
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
