"""The published recipe, field by field, and what each row of the published tables resolves to.

`python tests/golden/test_recipe.py` writes the expected files anew (the packages must be on the path).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.finetunes import MINIMAL, merged
from tests.support.training import make_job
from yuan2_core.conflicts import job_conflicts
from yuan2_core.contract import Launch, TrainJob
from yuan2_core.presets import PRESETS
from yuan2_core.sections import DEFAULT_EPOCHS, DEFAULT_WARMUP_RATIO, Checkpoint, Method, Training
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.constants import KIND_FINETUNE
from yuan2_operator.plan.finetune import train_job
from yuan2_operator.plan.owner import Owner
from yuan2_trainer.model.deepspeed import engine_config

HERE = Path(__file__).parent / "recipe"
ROWS: list[dict[str, Any]] = json.loads((HERE / "measured.json").read_text(encoding="utf-8"))["rows"]
PUBLISHED: dict[str, Any] = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
METHODS = ("full", "lora", "qlora")
DEFAULTS = {"epochs": DEFAULT_EPOCHS, "warmupRatio": DEFAULT_WARMUP_RATIO}
"""Of fields that exclude others: they hold where none of those is given."""


def name_of(row: dict[str, Any]) -> str:
    return f"{row['table']}-{row['size']}-{row['method']}-{row['length']}"


def on_gpus(training: Training, stage: int) -> TrainJob:
    launch = Launch(nodes=1, processes_per_node=8, device="cuda")
    made = make_job(Path("model"), Path("data"), Path("output"), stage=stage)
    return made.model_copy(update={"training": training, "launch": launch})


def job_of(row: dict[str, Any]) -> TrainJob:
    """The least resource of a row as a job: everything but size, method, length and batch is a default."""
    batch = {
        "maxLength": row["length"],
        "microBatchSize": row["microBatch"],
        "gradientAccumulationSteps": row["globalBatch"] // (row["microBatch"] * row["gpus"]),
    }
    spec = {
        "model": {"size": row["size"]},
        "method": {"full": None, row["method"]: {}},
        "training": batch,
        "workers": {"replicas": 1, "processesPerWorker": None, "gpusPerWorker": row["gpus"]},
    }
    owner = Owner(KIND_FINETUNE, "row", "default", "uid", 1)
    return train_job(owner, FineTuneSpec.model_validate(merged(MINIMAL, spec)), 1)


def resolved(row: dict[str, Any]) -> dict[str, Any]:
    """What the least resource becomes."""
    job, preset = job_of(row), PRESETS[row["size"]]
    assert list(job_conflicts(job)) == []
    return {
        "model": {
            "hiddenSize": preset.hidden_size,
            "numHiddenLayers": preset.num_hidden_layers,
            "numAttentionHeads": preset.num_attention_heads,
            "intermediateSize": preset.intermediate_size,
            "vocabSize": preset.vocab_size,
        },
        "method": json.loads(job.method.to_json()),
        "processes": job.launch.nodes * job.launch.processes_per_node,
        "globalBatch": job.launch.processes_per_node
        * job.training.micro_batch_size
        * job.training.gradient_accumulation_steps,
        "training": {**DEFAULTS, **json.loads(job.training.to_json())},
        "checkpoint": json.loads(job.checkpoint.to_json()),
        "stage": job.stage,
        "deepspeed": engine_config(job),
    }


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_row_of_the_published_tables_resolves_to_its_stored_configuration(row: dict[str, Any]) -> None:
    stored = json.loads((HERE / f"{name_of(row)}.json").read_text(encoding="utf-8"))
    assert resolved(row) == stored
    assert stored["globalBatch"] == row["globalBatch"]


def test_every_stored_configuration_belongs_to_a_row() -> None:
    stored = {path.stem for path in HERE.glob("*.json")} - {"measured", "published"}
    assert stored == {name_of(row) for row in ROWS}


def test_the_defaults_are_the_published_hyperparameters() -> None:
    ours = {**DEFAULTS, **json.loads(Training().to_json())}
    assert {name: ours[name] for name in PUBLISHED["training"]} == PUBLISHED["training"]
    assert json.loads(Checkpoint().to_json()).items() >= PUBLISHED["checkpoint"].items()


def test_zero_2_is_the_published_section() -> None:
    ours = engine_config(on_gpus(Training(), 2))
    published = PUBLISHED["deepspeed"]
    assert ours["zero_optimization"] == published["zero_optimization"]
    assert ours["zero_allow_untested_optimizer"] is published["zero_allow_untested_optimizer"]


def test_what_the_publisher_leaves_to_the_trainer_is_filled_in_from_the_hyperparameters() -> None:
    training = Training()
    ours = engine_config(on_gpus(training, 2))
    left = {name for name, value in PUBLISHED["deepspeed"].items() if value == "auto"}
    expected = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
    }
    assert left == set(expected)
    assert {name: ours[name] for name in left} == expected
    assert ours["bf16"] == {"enabled": True}


def test_large_models_use_zero_3_and_four_bit_weights_none() -> None:
    stages = {name_of(row): resolved(row)["stage"] for row in ROWS}
    by_method = {"full": 2, "lora": 3, "qlora": 0}
    assert stages == {name_of(row): by_method[row["method"]] for row in ROWS}


@pytest.mark.parametrize("method", METHODS)
def test_methods_default_to_the_published_adapters(method: str) -> None:
    found = json.loads(Method.model_validate({method: {}}).to_json())
    expected = {} if method == "full" else PUBLISHED["lora"]
    assert list(found) == [method]
    assert {name: found[method].get(name) for name in expected} == expected


def write() -> None:
    for row in ROWS:
        text = json.dumps(resolved(row), indent=2) + "\n"
        (HERE / f"{name_of(row)}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
