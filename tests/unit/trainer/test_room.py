"""Room on the output volume, asked for before the training."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_job, write_data
from yuan2_model.dimensions import Dimensions, read_dimensions
from yuan2_trainer.pod.outcome import OutputFullError
from yuan2_trainer.pod.room import check_room, most_checkpoints, room_after_data, room_before_data

Usage = namedtuple("Usage", "total used free")
NUMBERS = {
    "model_type": "yuan",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eod_token": 0,
    "sep_token": 1,
}


@pytest.fixture
def dimensions() -> Dimensions:
    return read_dimensions(NUMBERS)


def job_of(tmp_path: Path, **changes: Any) -> Any:
    fields = {"micro_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": None, **changes}
    return make_job(tmp_path / "model", tmp_path / "data.json", tmp_path / "output", **fields)


@pytest.mark.parametrize(
    ("changes", "samples", "expected"),
    [
        ({"epochs": 1.0, "every_steps": 10}, 100, 2),  # by time, and the last one while it is written
        ({"max_steps": 1, "every_steps": 10}, 100, 1),
        ({"epochs": 1.0, "every_steps": 3}, 100, 5),
        ({"epochs": 3.0, "every_steps": 1, "keep": 4}, 100, 6),
        ({"max_steps": 50, "every_steps": 1, "keep": 1}, 10, 3),
        ({"epochs": 3.0, "every_steps": 1, "keep": 4, "processes": 2}, 100, 6),
        ({"epochs": 3.0, "every_steps": 8, "keep": 9, "processes": 2}, 100, 3),
    ],
)
def test_checkpoints_are_counted_with_the_one_being_written(
    tmp_path: Path, changes: dict[str, Any], samples: int, expected: int
) -> None:
    assert most_checkpoints(job_of(tmp_path, **changes), samples) == expected


def test_evaluation_keeps_one_more(tmp_path: Path) -> None:
    job = job_of(tmp_path, epochs=3.0, every_steps=1, keep=4)
    dataset = job.dataset.model_copy(update={"eval_fraction": 0.1})
    assert most_checkpoints(job.model_copy(update={"dataset": dataset}), 100) == 7


def test_everything_that_is_written_counts(tmp_path: Path, dimensions: Dimensions) -> None:
    size = dimensions.parameters
    job = job_of(tmp_path, epochs=3.0, every_steps=1, keep=4)
    full = room_after_data(job, dimensions, 100)
    assert full.needed == pytest.approx(6 * 12 * size + 1.05 * 4 * size)
    lora = {"method": {"lora": {"r": 2, "target_modules": ["q_proj"]}}}
    trained = 2 * 2 * (16 + 16)
    adapter = room_after_data(job_of(tmp_path, epochs=3.0, every_steps=1, keep=4, **lora), dimensions, 100)
    assert adapter.needed == pytest.approx(6 * 12 * trained + 1.05 * 4 * trained)
    merging = job_of(tmp_path, epochs=3.0, every_steps=1, keep=4, merge_adapter=True, **lora)
    merged = room_after_data(merging, dimensions, 100)
    assert merged.needed == pytest.approx(adapter.needed + 1.05 * 4 * size)


def test_checkpoints_of_earlier_attempts_have_their_place(tmp_path: Path, dimensions: Dimensions) -> None:
    job = job_of(tmp_path, epochs=3.0, every_steps=1, keep=4)
    fresh = room_after_data(job, dimensions, 100)
    directory = tmp_path / "output" / "checkpoints" / "step-000003"
    directory.mkdir(parents=True)
    (directory / "shard").write_bytes(b"x" * 1000)
    assert room_after_data(job, dimensions, 100).needed == fresh.needed - 1000


def test_data_count_until_they_are_prepared(tmp_path: Path, dimensions: Dimensions) -> None:
    data = write_data(tmp_path / "data.json", 30)
    cache = tmp_path / "output" / "data"
    before = room_before_data(job_of(tmp_path), dimensions, cache)
    assert before.data == data.stat().st_size
    (cache / "key").mkdir(parents=True)
    (cache / "key" / "tokens.bin").write_bytes(b"x" * 100)
    assert room_before_data(job_of(tmp_path), dimensions, cache).data == before.data - 100


def test_a_full_volume_is_named_with_what_is_needed(
    tmp_path: Path, dimensions: Dimensions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**5, 10**5))
    room = room_after_data(job_of(tmp_path, epochs=3.0, every_steps=1, keep=4), dimensions, 100)
    with pytest.raises(OutputFullError) as caught:
        check_room(tmp_path, room)
    text = str(caught.value)
    assert f"output: {tmp_path} has 0.00 GB free" in text
    assert "6 checkpoints of" in text
    assert "or lower checkpoint.keep" in text
