"""What makes two attempts parts of one run, the base model included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_job, write_model
from yuan2_model.fingerprint import PIECE, model_fingerprint
from yuan2_trainer.data.prepare import Prepared
from yuan2_trainer.train.identity import differences, names_its_base, run_identity


def identity(data: str = "d", base: str = "b", **training: Any) -> dict[str, Any]:
    prepared = Prepared(
        samples=1,
        dropped_samples=0,
        longest=1,
        tokens=1,
        fingerprint=data,
        pad_id=0,
        base_fingerprint=base,
    )
    return run_identity(make_job(Path("/m"), Path("/d"), Path("/o"), **training), prepared)


def test_speed_settings_may_change_between_attempts() -> None:
    before = identity(micro_batch_size=4, gradient_accumulation_steps=2)
    now = identity(micro_batch_size=1, gradient_accumulation_steps=8, processes=2, stage=3)
    assert differences(before, now) == []


def test_what_would_change_the_result_may_not() -> None:
    before, now = identity(seed=1), identity("g", seed=2, max_steps=None, epochs=1.0)
    assert differences(before, now) == [
        "the prepared data (dataset, tokenizer or maxLength) changed",
        "training.epochs was absent and is 1.0",
        "training.maxSteps was 6 and is absent",
        "training.seed was 1 and is 2",
    ]


def test_another_base_model_is_another_run() -> None:
    assert differences(identity(base="a"), identity(base="b")) == [
        "the base model (config.json or the weights of model.source) changed"
    ]


def test_an_output_of_an_earlier_release_goes_on_with_the_fields_that_it_did_not_know_at_their_defaults() -> (
    None
):
    earlier = {
        name: value for name, value in identity().items() if name not in ("model.files", "training.schedule")
    }
    assert not names_its_base(earlier)
    assert names_its_base(identity())
    assert differences(earlier, identity()) == []
    assert differences(earlier, identity(schedule="linear")) == ["training.schedule was absent and is linear"]
    del earlier["training.maxSteps"]
    assert differences(earlier, identity()) == ["training.maxSteps was absent and is 6"]


def test_an_adapter_of_an_earlier_release_had_the_defaults_of_fields_that_it_did_not_know() -> None:
    earlier = identity(method={"lora": {"r": 4}})
    del earlier["method"]["lora"]["rsLora"]
    assert differences(earlier, identity(method={"lora": {"r": 4}})) == []
    assert differences(earlier, identity(method={"lora": {"r": 4, "rs_lora": True}})) != []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", layers=1)


def test_a_copied_model_is_the_same_and_one_of_another_seed_is_not(base: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config, indent=7))
    assert model_fingerprint(copied) == model_fingerprint(base)
    other = write_model(tmp_path / "other", layers=1, seed=1)
    weights = "model.safetensors"
    assert (other / weights).stat().st_size == (base / weights).stat().st_size
    assert model_fingerprint(other) != model_fingerprint(base)


def test_config_and_index_and_the_ends_of_each_file_count(base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    seen = {model_fingerprint(model)}
    weights = model / "model.safetensors"
    (model / "part.safetensors").write_bytes(weights.read_bytes() + bytes(3 * PIECE))
    weights.unlink()
    index = model / "model.safetensors.index.json"
    for name in ("a", "b"):
        index.write_text(json.dumps({"weight_map": {name: "part.safetensors"}}))
        seen.add(model_fingerprint(model))
    size = (model / "part.safetensors").stat().st_size
    for place in (0, PIECE - 1, size - PIECE, size - 1):
        with (model / "part.safetensors").open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 1]))
        seen.add(model_fingerprint(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    seen.add(model_fingerprint(model))
    assert len(seen) == 8
