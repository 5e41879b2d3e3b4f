"""Bad input ends a run before training, once, with file, record and field in the status."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, finetune, namespace, source
from tests.support.training import conversations, write_data, write_model
from tests.support.waiting import wait_for
from yuan2_trainer.checkpoint.manifest import complete_checkpoints, verify_file
from yuan2_trainer.checkpoint.shards import ShardReader

SECONDS = 180.0


@pytest.fixture(scope="module")
def bench(operated: TestCluster) -> Iterator[Namespace]:
    """A namespace whose claim `models` holds a sound model and sound data, and broken ones beside them."""
    with namespace(operated, "e2e-bad-input") as made:
        directory = made.claim("models")
        model = write_model(directory / "model")
        write_data(directory / "data.json", 12)
        _break_inputs(directory, model)
        yield made


def _break_inputs(directory: Path, model: Path) -> None:
    silent = conversations(3)
    silent[1]["conversations"][1]["value"] = ""
    (directory / "silent.json").write_text(json.dumps(silent))
    shutil.copytree(model, directory / "missing-tensor")
    weights = directory / "missing-tensor" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights)
    weights.chmod(0o644)


# One of each kind; tests/integration/trainer/test_bad_input.py has the others, without a node.
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "silent": (
        {"dataset": {"source": source("silent.json")}},
        "InvalidData",
        ("silent.json", "record 2", "conversations[1]"),
    ),
    "missing-tensor": (
        {"model": {"source": source("missing-tensor")}},
        "InvalidModel",
        ("missing-tensor", "model.layers.1.mlp.up_proj.weight"),
    ),
}


@pytest.fixture(scope="module")
def refused(bench: Namespace) -> Namespace:
    """All the bad runs, applied together."""
    bench.apply(*(finetune(name, **changes) for name, (changes, _, _) in CASES.items()))
    return bench


@pytest.mark.node
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_can_never_work_fails_once_and_says_why(refused: Namespace, name: str) -> None:
    refused.wait(f"y2ft/{name}", "Failed", SECONDS)

    status = refused.status("y2ft", name)
    failed = refused.condition("y2ft", name, "Failed")
    _, reason, words = CASES[name]
    assert failed["reason"] == reason
    for word in words:
        assert word in failed["message"]
    assert "\n" not in failed["message"]
    assert status["phase"] == "Failed"
    assert status["restarts"] == 0
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Invalid"]
    assert len(refused.list("jobs", f"yuan2.dev/finetune={name}")) == 1
    pods = refused.list("pods", f"yuan2.dev/finetune={name}")
    assert {pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] for pod in pods} == {78}


@pytest.mark.node
def test_a_missing_claim_is_waited_for(operated: TestCluster) -> None:
    with namespace(operated, "e2e-claim") as made:
        made.apply(finetune("early", training={"maxSteps": 2}))
        made.wait("y2ft/early", "Accepted=False", 60)
        waiting = made.condition("y2ft", "early", "Accepted")
        assert waiting["reason"] == "ClaimNotFound"
        assert "models" in waiting["message"]
        assert not made.list("jobs")

        directory = made.claim("models")
        write_model(directory / "model")
        write_data(directory / "data.json", 12)
        made.wait("y2ft/early", "Complete", SECONDS)


@pytest.fixture
def small(operated: TestCluster) -> Iterator[tuple[Namespace, Path]]:
    """A namespace with model and data, and the directory of its claim `small` of 64 MiB."""
    with namespace(operated, "e2e-full") as made:
        directory = made.claim("models")
        write_model(directory / "model", layers=4, hidden=128)
        write_data(directory / "data.json", 12)
        yield made, made.claim("small", size="64Mi", tmpfs=True)


def _long_run(name: str, keep: int) -> dict[str, Any]:
    return finetune(
        name,
        training={"maxSteps": 400},
        checkpoint={"everySteps": 4, "keep": keep},
        runPolicy={"maxRestarts": 0},
        output=source(name, "small"),
    )


@pytest.mark.node
def test_a_volume_that_is_too_small_is_refused_before_training(small: tuple[Namespace, Path]) -> None:
    made, _ = small
    made.apply(_long_run("narrow", keep=100))
    made.wait("y2ft/narrow", "Failed", SECONDS)
    failed = made.condition("y2ft", "narrow", "Failed")
    assert failed["reason"] == "OutputFull"
    assert "lower checkpoint.keep" in failed["message"]
    assert not made.status("y2ft", "narrow").get("step")


@pytest.mark.node
def test_a_volume_that_fills_up_fails_clearly_and_keeps_the_last_checkpoint(
    small: tuple[Namespace, Path],
) -> None:
    made, volume = small
    made.apply(_long_run("full", keep=1))
    checkpoints = volume / "full" / "checkpoints"
    wait_for("a checkpoint", lambda: list(complete_checkpoints(checkpoints, str)), SECONDS)

    def somebody_else_writes() -> bool:
        with (volume / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(1 << 20)):
                pass
        return made.status("y2ft", "full").get("phase") == "Failed"

    wait_for("the failure", somebody_else_writes, SECONDS)
    failed = made.condition("y2ft", "full", "Failed")
    assert failed["reason"] == "OutputFull"
    _assert_newest_checkpoint_loads(checkpoints, made.status("y2ft", "full"))


def _assert_newest_checkpoint_loads(directory: Path, status: dict[str, Any]) -> None:
    """Every number of it is read, and is what was written."""
    warnings: list[str] = []
    found = next(iter(complete_checkpoints(directory, warnings.append)))
    assert not warnings
    assert found.manifest.position.step == status["lastCheckpointStep"] > 0
    assert [verify_file(found.directory, *item) for item in found.manifest.files.items()] == [None]
    reader = ShardReader(found)
    assert found.manifest.shapes
    for name, shape in found.manifest.shapes.items():
        tensor = reader.full(name)
        assert list(tensor.shape) == shape
        assert tensor.isfinite().all()
