"""Prepared samples and padded batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import write_data
from yuan2_core.contract import DatasetLocation
from yuan2_core.conversation import IGNORED, Spans
from yuan2_core.errors import DatasetError
from yuan2_core.sections import Training
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data.collate import collate
from yuan2_trainer.data.prepare import prepare
from yuan2_trainer.data.store import SampleStore, write_store

sample = st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=40).map(
    lambda pairs: ([token for token, _ in pairs], [token if learned else IGNORED for token, learned in pairs])
)


def spans(ids: list[int], labels: list[int]) -> Spans:
    """A sample as the renderer gives it, a span a learned token."""
    learned = [[i, i + 1] for i, mark in enumerate(labels) if mark != IGNORED]
    return Spans(np.array(ids, dtype=np.int32), np.array(learned, dtype=np.int32).reshape(-1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["what is wind", "wind is air that moves"], 300, path)


def prepare_at(
    path: Path, target: Path, tokenizer: Yuan2Tokenizer, fraction: float = 0.0, **training: object
):
    location = DatasetLocation(path=str(path), max_invalid_fraction=fraction)
    return prepare(location, Training(**training), tokenizer, target, lambda: None)


@given(st.lists(sample, min_size=1, max_size=12))
def test_a_store_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[list[int], list[int]]]
) -> None:
    directory = tmp_path_factory.mktemp("store")
    write_store(directory, [spans(*one) for one in written])
    store = SampleStore.open(directory)
    assert len(store) == len(written)
    for index, (ids, labels) in enumerate(written):
        tokens, marks = store.sample(index)
        assert (tokens.tolist(), marks.tolist()) == (ids, labels)
        assert store.lengths[index] == len(ids)
        assert store.labelled[index] == sum(mark != IGNORED for mark in labels[1:])


def test_the_fingerprint_sees_every_label(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a", [spans([1, 2, 3], [IGNORED, 2, 3])])
    other = write_store(tmp_path / "b", [spans([1, 2, 3], [IGNORED, IGNORED, 3])])
    again = write_store(tmp_path / "c", [spans([1, 2, 3], [IGNORED, 2, 3])])
    assert first == again != other


@pytest.mark.parametrize(("longest", "limit", "width"), [(5, 64, 8), (8, 64, 8), (9, 64, 16), (9, 12, 12)])
def test_rows_are_padded_to_a_multiple_of_8_within_the_limit(
    tmp_path: Path, longest: int, limit: int, width: int
) -> None:
    numbers = list(range(longest))
    write_store(tmp_path, [spans(numbers, numbers), spans([7, 7], [IGNORED, 7])])
    batch = collate(SampleStore.open(tmp_path), [np.array([1]), np.array([0])], pad_id=99, max_length=limit)
    assert batch.input_ids.shape == (2, width)
    assert batch.input_ids[0].tolist() == [7, 7] + [99] * (width - 2)
    assert batch.labels[0].tolist() == [IGNORED, 7] + [IGNORED] * (width - 2)
    assert batch.attention_mask.sum(axis=1).tolist() == [2, longest]
    assert batch.document_ids is None


def test_a_packed_row_names_the_sample_of_each_token(tmp_path: Path) -> None:
    samples = [([1, 2, 3], [IGNORED, 2, 3]), ([4, 5], [IGNORED, 5]), ([6], [6])]
    write_store(tmp_path, [spans(*one) for one in samples])
    batch = collate(SampleStore.open(tmp_path), [np.array([1, 0]), np.array([2])], pad_id=9, max_length=64)
    assert batch.input_ids.tolist() == [[4, 5, 1, 2, 3, 9, 9, 9], [6] + [9] * 7]
    assert batch.labels[0].tolist() == [IGNORED, 5, IGNORED, 2, 3] + [IGNORED] * 3
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1, -1, -1, -1], [0] + [-1] * 7]
    assert batch.attention_mask.tolist() == [[1] * 5 + [0] * 3, [1] + [0] * 7]


def test_preparation_counts_what_it_made(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> None:
    prepared = prepare_at(write_data(tmp_path / "d.json", 9), tmp_path / "store", tokenizer)
    store = SampleStore.open(tmp_path / "store")
    assert prepared.samples == len(store) == 18
    assert prepared.dropped_samples == 0
    assert prepared.tokens == len(store.tokens)
    assert prepared.longest == store.lengths.max()
    assert prepared.pad_id == tokenizer.pad_id


def test_sequences_without_a_label_stop_the_run_or_are_counted(
    tmp_path: Path, tokenizer: Yuan2Tokenizer
) -> None:
    record = {"instruction": "what is wind", "output": "air that moves"}
    long = {"instruction": "what is wind", "output": "air " * 100}
    path = tmp_path / "d.json"
    path.write_text(json.dumps([record, record, record, long]))
    with pytest.raises(DatasetError, match="1 of 4 sequences have no answer left"):
        prepare_at(path, tmp_path / "store", tokenizer, max_length=120)
    prepared = prepare_at(path, tmp_path / "store", tokenizer, fraction=0.25, max_length=120)
    assert (prepared.samples, prepared.dropped_samples) == (3, 1)


def test_refused_records_are_counted_as_dropped(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]))
    with pytest.raises(DatasetError, match="record 2, output"):
        prepare_at(path, tmp_path / "store", tokenizer)
    assert prepare_at(path, tmp_path / "store", tokenizer, fraction=0.5).dropped_samples == 1


def test_a_file_whose_answers_are_all_too_long_is_refused(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"instruction": "wind", "output": "air " * 100}]))
    with pytest.raises(DatasetError, match="1 of 1 sequences have no answer left"):
        prepare_at(path, tmp_path / "store", tokenizer, fraction=1.0, max_length=8)
