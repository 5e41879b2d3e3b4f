"""Several files, weights, compression and raw text: equal data make an equal store, however they lie."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.training import conversations
from yuan2_core.contract import DatasetLocation
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data.prepare import Prepared, content_key, prepare
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.pod.room import _size

RECORDS = conversations(8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    return train_tokenizer(["what is wind", "air that moves"], 300, tmp_path_factory.mktemp("t"))


def prepared(root: Path, tokenizer: Yuan2Tokenizer, path: Path, **fields: Any) -> Prepared:
    location = DatasetLocation.model_validate({"path": str(path), **fields})
    target = root / f"store-{len(list(root.glob('store-*')))}"
    return prepare(location, Training(max_length=64), tokenizer, target, lambda: None)


def test_files_with_weights_are_the_file_with_each_record_as_often(
    tmp_path: Path, tokenizer: Yuan2Tokenizer
) -> None:
    mix = tmp_path / "mix"
    mix.mkdir()
    (mix / "a.json").write_text(json.dumps(RECORDS[:4]))
    (mix / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS[4:])).encode()))
    one = tmp_path / "one.json"
    one.write_text(json.dumps(RECORDS))
    plain = prepared(tmp_path, tokenizer, one)
    assert prepared(tmp_path, tokenizer, mix).fingerprint == plain.fingerprint
    files = [{"path": "a.json", "weight": 2}, {"path": "b.jsonl.gz", "weight": 0.5}]
    one.write_text(json.dumps([*(record for record in RECORDS[:4] for _ in range(2)), *RECORDS[5::2]]))
    weighted = prepared(tmp_path, tokenizer, mix, files=files)
    assert weighted == prepared(tmp_path, tokenizer, one)
    assert weighted.fingerprint != plain.fingerprint


def test_the_cache_knows_formats_and_weights(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    keys = {
        content_key(
            DatasetLocation.model_validate({"path": str(tmp_path), "files": [{"path": "a.json", **file}]}),
            Training(),
            tokenizer,
            lambda: None,
        )
        for file in ({}, {"weight": 2}, {"format": "fastchat"})
    }
    assert len(keys) == 3


def test_raw_text_is_learned_whole_and_beside_conversations(
    tmp_path: Path, tokenizer: Yuan2Tokenizer
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.txt").write_text("what is wind? " * 40)
    both = prepared(tmp_path, tokenizer, tmp_path)
    alone = prepared(tmp_path, tokenizer, tmp_path, files=[{"path": "b.txt"}])
    talk = prepared(tmp_path, tokenizer, tmp_path, files=[{"path": "a.json"}])
    assert both.samples == alone.samples + talk.samples
    store = SampleStore.open(tmp_path / "store-1")
    whole = [*tokenizer.encode("what is wind? " * 40, structure=False), tokenizer.eod_id]
    assert int(store.labelled.sum()) == len(whole) - 1
    assert store.labelled.tolist() == (store.lengths - 1).tolist()
    assert len(np.unique(store.conversations)) == len(store)


def test_the_room_for_a_directory_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.json", "deep/b.json"):
        (tmp_path / name).write_text("x" * 100)
    assert _size(str(tmp_path)) == 200
    assert _size(str(tmp_path / "a.json")) == 100
    assert _size(str(tmp_path / "none")) == 0
