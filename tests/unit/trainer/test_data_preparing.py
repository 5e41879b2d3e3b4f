"""Preparation over several processes, and the cache that attempts share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.training import conversations, write_data
from yuan2_core.contract import DatasetLocation
from yuan2_core.errors import DatasetError
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data import prepare as preparing
from yuan2_trainer.data.prepare import Prepared, prepare
from yuan2_trainer.data.store import SampleStore


class WithdrawnError(Exception):
    """What a beat raises."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    return train_tokenizer(["what is wind", "air that moves"], 300, tmp_path_factory.mktemp("t"))


def run(path: Path, root: Path, name: str, tokenizer: Yuan2Tokenizer, **training: object) -> Prepared:
    location = DatasetLocation(path=str(path), max_invalid_fraction=0.01)
    return prepare(location, Training(**training), tokenizer, root / name, lambda: None, root / "cache")


def in_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "BYTES_A_PROCESS", 100)
    monkeypatch.setattr(preparing, "available_cpus", lambda: 2)


def test_several_processes_make_what_one_makes(
    tmp_path: Path, tokenizer: Yuan2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*conversations(700), {"conversations": []}]))
    location = DatasetLocation(path=str(path), max_invalid_fraction=0.01)
    alone = prepare(location, Training(), tokenizer, tmp_path / "alone", lambda: None)
    in_two_processes(monkeypatch)
    together = prepare(location, Training(), tokenizer, tmp_path / "together", lambda: None)
    assert together == alone
    assert together.dropped_samples == 1
    files = [sorted(item.name for item in (tmp_path / name).iterdir()) for name in ("alone", "together")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_errors_of_several_processes_are_counted_and_the_first_ten_shown(
    tmp_path: Path, tokenizer: Yuan2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = conversations(600)
    for number in range(0, 600, 50):
        records[number]["conversations"][1]["value"] = ""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    in_two_processes(monkeypatch)
    with pytest.raises(DatasetError, match="12 of 600 records cannot be used") as caught:
        run(path, tmp_path, "store", tokenizer)
    assert "record 451 (id r450), conversations[1].value: empty answer (line 1); and 2 more" in str(
        caught.value
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_withdrawn_preparation_ends_at_once_and_leaves_nothing(
    tmp_path: Path, tokenizer: Yuan2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_data(tmp_path / "data.json", 600)
    in_two_processes(monkeypatch)
    calls = 0

    def beat() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise WithdrawnError

    location = DatasetLocation(path=str(path))
    with pytest.raises(WithdrawnError):
        prepare(location, Training(), tokenizer, tmp_path / "store", beat, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_next_attempt_uses_what_the_one_before_it_prepared(
    tmp_path: Path, tokenizer: Yuan2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_data(tmp_path / "data.json", 9)
    first = run(path, tmp_path, "first", tokenizer)
    monkeypatch.setattr(preparing, "render_all", None)  # nothing is rendered again
    assert run(path, tmp_path, "second", tokenizer) == first
    assert len(SampleStore.open(tmp_path / "second")) == first.samples


def test_other_data_and_other_settings_are_prepared_anew(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> None:
    path = write_data(tmp_path / "data.json", 9)
    prints = {run(path, tmp_path, "a", tokenizer).fingerprint}
    prints.add(run(path, tmp_path, "b", tokenizer, loss="efficient").fingerprint)
    prints.add(run(path, tmp_path, "c", tokenizer, max_length=64).fingerprint)
    write_data(path, 8)
    prints.add(run(path, tmp_path, "d", tokenizer).fingerprint)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert len(prints) == 4
