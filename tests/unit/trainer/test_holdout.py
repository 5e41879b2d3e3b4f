"""Conversations to evaluate on are set aside whole, by what is said in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import conversations, make_job
from yuan2_core.errors import DatasetError
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_trainer.data.holdout import choose, evaluation_samples, set_aside, training_samples
from yuan2_trainer.data.prepare import Prepared, prepare
from yuan2_trainer.data.store import SampleStore
from yuan2_trainer.evaluation.samples import choose_questions
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.train.identity import differences, run_identity


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    texts = [message["value"] for record in conversations(30) for message in record["conversations"]]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("t"))


@pytest.fixture
def hold_out(tmp_path: Path, tokenizer: Yuan2Tokenizer) -> Any:
    """Prepare records and set some aside; the workspace and what is known of the data."""
    count = 0

    def run(records: list[dict[str, Any]], **changes: Any) -> tuple[Workspace, Prepared]:
        nonlocal count
        count += 1
        root = tmp_path / str(count)
        root.mkdir()
        path = root / "data.json"
        path.write_text(json.dumps(records))
        workspace = Workspace(root)
        job = make_job(tmp_path, path, tmp_path / "o", **{"eval_fraction": 0.2, **changes})
        cache = tmp_path / "cache"
        prepared = prepare(job.dataset, job.training, tokenizer, workspace.samples, lambda: None, cache)
        return workspace, set_aside(job, prepared, tokenizer, workspace, lambda: None, cache)

    return run


@given(
    contents=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**70),
)
def test_the_choice_is_of_contents_alone(contents: list[int], fraction: float, seed: int) -> None:
    keys = np.asarray(contents, dtype=np.uint64)
    chosen = choose(keys, fraction, seed)
    assert chosen is not None
    held, left = set(keys[chosen].tolist()), set(keys[~chosen].tolist())
    assert held
    assert left
    assert not held & left
    backwards = choose(keys[::-1], fraction, seed)
    assert backwards is not None
    assert backwards[::-1].tolist() == chosen.tolist()
    wanted = max(1, round(fraction * len(keys)))
    largest = max(contents.count(key) for key in set(contents))
    assert min(wanted, len(keys) - largest) <= chosen.sum() < wanted + largest


def samples_of(store: SampleStore, indices: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(store.tokens_of(int(index)).tolist()) for index in indices}


def test_no_conversation_is_in_both_and_none_is_lost(hold_out: Any) -> None:
    records = conversations(40)
    workspace, prepared = hold_out([*records, *records[:5]])
    held, left = evaluation_samples(workspace), training_samples(workspace)
    store = SampleStore.open(workspace.samples)
    assert held is not None
    assert left is not None
    assert sorted([*held.indices, *left]) == list(range(len(store)))
    assert not set(store.conversations[held.indices]) & set(store.conversations[left])
    assert not samples_of(store, held.indices) & samples_of(store, left)
    assert (prepared.samples, prepared.eval_samples) == (len(left), len(held.indices))
    assert prepared.tokens == store.lengths[left].sum()
    assert len(set(store.conversations[held.indices])) == pytest.approx(9, abs=1)


def test_order_does_not_matter_but_the_seed_does(hold_out: Any) -> None:
    records = conversations(40)
    found = []
    for data, changes in ((records, {}), (records[::-1], {}), (records, {"seed": 7})):
        workspace, _ = hold_out(data, **changes)
        held = evaluation_samples(workspace)
        assert held is not None
        found.append(samples_of(held.store, held.indices))
    assert found[0] == found[1] != found[2]


def test_a_small_fraction_holds_out_one_conversation(hold_out: Any) -> None:
    workspace, _ = hold_out(conversations(9), eval_fraction=0.001)
    held = evaluation_samples(workspace)
    assert held is not None
    assert len(set(held.store.conversations[held.indices])) == 1


def test_data_of_one_conversation_cannot_be_split(hold_out: Any) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.evalFraction 0\.2 leaves nothing to train on"):
        hold_out(conversations(1) * 4)


def test_nothing_is_held_out_unless_asked_for(hold_out: Any) -> None:
    workspace, prepared = hold_out(conversations(5), eval_fraction=0.0)
    assert evaluation_samples(workspace) is None
    assert training_samples(workspace) is None
    assert prepared.eval_samples == 0


def test_another_file_is_read_by_the_same_rules_and_named_in_errors(hold_out: Any, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([*conversations(9), {"conversations": []}]))
    changes = {"eval_fraction": 0.0, "eval_path": str(path)}
    with pytest.raises(DatasetError, match=r"1 of 10 records .*evaluation\.json"):
        hold_out(conversations(5), **changes)
    workspace, prepared = hold_out(conversations(5), max_invalid_fraction=0.1, **changes)
    held = evaluation_samples(workspace)
    assert held is not None
    assert training_samples(workspace) is None
    assert len(held.store) == len(held.indices) == prepared.eval_samples
    assert prepared.eval_fingerprint not in (None, prepared.fingerprint)
    path.unlink()
    with pytest.raises(DatasetError, match=r"evaluation\.json: cannot be read"):
        hold_out(conversations(5), **changes)


def test_a_run_is_told_apart_by_what_it_is_judged_on(tmp_path: Path) -> None:
    def identity(fingerprint: str | None = None, **changes: Any) -> dict[str, Any]:
        prepared = Prepared(
            samples=1,
            dropped_samples=0,
            longest=1,
            tokens=1,
            fingerprint="f",
            pad_id=0,
            eval_fingerprint=fingerprint,
        )
        return run_identity(make_job(tmp_path, tmp_path, tmp_path, **changes), prepared)

    assert "dataset.evalFraction" not in identity()
    assert identity(eval_fraction=0.1, evaluation={"every_steps": 2}) == identity(eval_fraction=0.1)
    changed = differences(identity(eval_fraction=0.1), identity(eval_fraction=0.2))
    assert changed == ["dataset.evalFraction was 0.1 and is 0.2"]
    assert "dataset.evalSource" in differences(identity("a"), identity("b"))[0]


def test_questions_are_spread_over_the_held_out_data(hold_out: Any, tokenizer: Yuan2Tokenizer) -> None:
    workspace, _ = hold_out(conversations(40), eval_fraction=0.5)
    held = evaluation_samples(workspace)
    assert held is not None
    questions = choose_questions(held, 5)
    assert len(questions) == 5
    for question in questions:
        assert question.prompt[-1] == tokenizer.sep_id
        assert question.reference
        assert tokenizer.eod_id not in question.reference
    assert len(choose_questions(held, 1000)) == len(held.indices)
    assert choose_questions(held, 0) == []
