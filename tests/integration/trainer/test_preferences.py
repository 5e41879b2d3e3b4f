"""DPO, ORPO and KTO on real ranks and through the real launcher."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.trainer.test_resume import cut_back, weights
from tests.support.preferences import write_pairs
from tests.support.ranks import train
from tests.support.training import losses, make_job, metrics, run_pod
from yuan2_core.contract import TrainJob

BASE: dict[str, Any] = {
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 6,
    "every_steps": 2,
    "learning_rate": 3e-3,
    "schedule": "constant",
}
DPO = {"objective": {"dpo": {}}}
LORA = {"method": {"lora": {"dropout": 0.1, "target_modules": ["q_proj", "k_proj", "down_proj"]}}}
SHAPES: list[dict[str, Any]] = [
    {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "processes": 2},
    {"micro_batch_size": 2, "processes": 2, "stage": 3, "packing": False},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pairs in steps of four: the third step holds three."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.json", 11)


@pytest.fixture(scope="module")
def run(inputs: tuple[Path, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def ran(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            root = tmp_path_factory.mktemp("run")
            train(make_job(inputs[0], data, root / "output", **{**BASE, **changes}), root / "workspace")
            made[key] = root / "output"
        return made[key]

    return ran


def column(output: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(output) if "loss" in row]


def test_dpo_through_the_launcher_learns_what_is_preferred(
    inputs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    job = make_job(
        inputs[0],
        data,
        tmp_path / "output",
        **{**BASE, **DPO, "max_steps": 12, "eval_fraction": 0.2, "evaluation": {"sample_answers": 2}},
    )
    code, pod = run_pod(job, tmp_path / "pod")
    assert code == 0, pod.output
    found = losses(tmp_path / "output")
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1] < 0.9 * found[0]
    assert column(tmp_path / "output", "rewardsMargin")[0] == pytest.approx(0, abs=1e-5)
    assert column(tmp_path / "output", "rewardsMargin")[-1] > 0
    assert column(tmp_path / "output", "rewardsAccuracy")[-1] > 0.5
    judged = [row for row in metrics(tmp_path / "output") if "evalLoss" in row]
    assert judged[0]["evalLoss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {"rewardsChosen", "rewardsRejected", "rewardsMargin", "rewardsAccuracy"} <= set(judged[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=["two-ranks", "zero-3-unpacked"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_step_depends_neither_on_ranks_nor_on_the_shape_of_batches(
    run: Any, objective: str, shape: dict[str, Any]
) -> None:
    wanted = {"objective": {objective: {}}}
    # Half as many pairs as KTO has examples: its batch counts single answers.
    one, other = run(**wanted), run(**wanted, **shape)
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    for name in ("rewardsChosen", "rewardsMargin"):
        assert column(other, name) == pytest.approx(column(one, name), abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [DPO, {**DPO, **LORA}, {"objective": {"kto": {}}, **LORA, "stage": 3}, {"objective": {"orpo": {}}}],
    ids=["dpo", "dpo-lora", "kto-lora-zero-3", "orpo"],
)
def test_a_resumed_run_ends_as_the_unbroken_one(
    run: Any, changes: dict[str, Any], inputs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    unbroken = run(**changes)
    output = cut_back(unbroken, 2, tmp_path / "output")
    train(make_job(inputs[0], data, output, **{**BASE, **changes}), tmp_path / "workspace")
    assert losses(output) == losses(unbroken)
    expected = weights(unbroken)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(output).items())


def test_with_an_adapter_the_reference_is_the_base_at_any_step(
    run: Any, inputs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    unbroken = run(**DPO, **LORA)
    output = cut_back(unbroken, 4, tmp_path / "output")
    shutil.rmtree(output / "reference")
    train(make_job(inputs[0], data, output, **{**BASE, **DPO, **LORA}), tmp_path / "workspace")
    assert losses(output) == pytest.approx(losses(unbroken), abs=1e-5)


def test_weights_that_have_moved_are_no_reference(
    run: Any, inputs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    output = cut_back(run(**DPO), 4, tmp_path / "output")
    shutil.rmtree(output / "reference")
    job: TrainJob = make_job(inputs[0], data, output, **{**BASE, **DPO})
    code, pod = run_pod(job, tmp_path / "pod")
    assert code == 78
    assert "delete the checkpoints of this output" in pod.termination["message"]
