"""Samples of a conversation in one row: the beginning once, the loss and gradients those of each alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yuan2_core.conversation import IGNORED, Conversation, Spans, render_spans
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_model import Yuan2Config, random_model
from yuan2_trainer.data.collate import MicroBatch, collate
from yuan2_trainer.data.families import LEAST_SHARED, families, family_of, work_of
from yuan2_trainer.data.packing import cut_batch
from yuan2_trainer.data.store import Block, SampleStore, StoreWriter

WORDS = ["wind", "rain", "snow", "river", "stone", "cloud", "light", "field", "horse", "paper", "north"]


def store_at(directory: Path, conversations: list[list[Spans]]) -> SampleStore:
    with StoreWriter(directory) as writer:
        writer.add(Block.of(conversations))
        writer.finish()
    return SampleStore.open(directory)


def dialogue(turns: int, seed: int) -> Conversation:
    choose = np.random.default_rng(seed)
    messages = []
    for turn in range(turns):
        for role, size in (("user", 9), ("assistant", 6)):
            text = " ".join(choose.choice(WORDS, size))
            messages.append({"role": role, "content": f"{text} {turn}?"})
    return Conversation(messages)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Yuan2Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([" ".join(WORDS), "a? b<n>c 0? 1? 2?"], 320, path)


@pytest.fixture
def store(tokenizer: Yuan2Tokenizer, tmp_path: Path) -> SampleStore:
    """Conversations of 5, 1, 3 and, cut to 90 tokens, 4 turns."""
    data = [(5, None), (1, None), (3, None), (4, 90)]
    rendered = [
        list(render_spans(dialogue(turns, seed), tokenizer, "split_example", limit))
        for seed, (turns, limit) in enumerate(data)
    ]
    return store_at(tmp_path / "store", rendered)


def sequences_of(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """The sequences of a batch, followed back from each token that nothing continues."""
    assert batch.previous_ids is not None
    found = []
    for ids, labels, mask, previous in zip(
        batch.input_ids, batch.labels, batch.attention_mask, batch.previous_ids, strict=True
    ):
        ends = [
            column
            for column in range(len(ids))
            if mask[column]
            and (column + 1 == len(ids) or not mask[column + 1] or previous[column + 1] != column)
        ]
        for end in ends:
            path = [end]
            while previous[path[-1]] >= 0:
                path.append(int(previous[path[-1]]))
            columns = path[::-1]
            own = [i for i in columns if i > end - len(columns)]
            found.append(
                ([int(ids[i]) for i in columns], [int(labels[i]) if i in own else IGNORED for i in columns])
            )
    return found


def test_a_row_holds_a_conversations_beginning_once(store: SampleStore) -> None:
    [family] = families(np.arange(5), store, 10_000)
    assert family.samples.tolist() == [4, 3, 2, 1, 0]
    assert family.shared[0] == 0
    assert all(shared >= LEAST_SHARED for shared in family.shared[1:])
    assert family.size < 0.6 * store.lengths[:5].sum()
    batch = collate(store, [family.samples], 0, 10_000)
    assert batch.document_ids is None
    assert int(batch.attention_mask.sum()) == family.size


def test_work_counts_what_is_computed(store: SampleStore) -> None:
    items = families(np.arange(len(store)), store, 400)
    tokens, pairs = work_of(items, store)
    assert tokens == sum(item.size for item in items)
    expected = 0
    for item in items:
        for sample, shared in zip(item.samples, item.shared, strict=True):
            expected += sum(range(shared + 1, int(store.lengths[sample]) + 1))
    assert pairs == expected


def test_every_sample_can_be_read_back_from_its_row(store: SampleStore) -> None:
    everything = np.arange(len(store))
    rows = [row for rows in cut_batch(everything, store, 2, 400, 1, packing=True) for row in rows]
    assert sorted(int(i) for row in rows for i in row) == everything.tolist()
    found = sequences_of(collate(store, rows, 0, 400))
    wanted = [tuple(part.tolist() for part in store.sample(int(i))) for row in rows for i in row]
    assert sorted(ids for ids, _ in found) == sorted(ids for ids, _ in wanted)
    assert sum(sum(m != IGNORED for m in labels) for _, labels in found) == store.labelled.sum()


@settings(deadline=None, max_examples=20)
@given(st.integers(60, 400))
def test_no_family_overflows_a_row_and_none_is_lost(
    tokenizer: Yuan2Tokenizer, tmp_path_factory: pytest.TempPathFactory, capacity: int
) -> None:
    rendered = [list(render_spans(dialogue(6, 1), tokenizer, "split_example", 60)) for _ in range(2)]
    rendered.append(list(render_spans(dialogue(3, 2), tokenizer, "split_example", capacity)))
    store = store_at(tmp_path_factory.mktemp("s"), rendered)
    found = families(np.arange(len(store)), store, capacity)
    assert sorted(int(i) for family in found for i in family.samples) == list(range(len(store)))
    assert all(family.size <= capacity for family in found)
    for family in found:
        assert [(f.shared, f.size) for f in family_of(family.samples, store)] == [
            (family.shared, family.size)
        ]


def test_a_family_that_fills_its_row_to_the_token_stays_together(store: SampleStore) -> None:
    [whole] = families(np.arange(5), store, 10_000)
    assert len(families(np.arange(5), store, whole.size)) == 1
    assert len(families(np.arange(5), store, whole.size - 1)) == 2


def test_the_families_of_a_row_are_found_again(store: SampleStore) -> None:
    one, two, three = families(np.arange(9), store, 10_000)
    row = np.concatenate((one.samples, two.samples, three.samples))
    found = [(family.samples.tolist(), family.shared, family.size) for family in family_of(row, store)]
    assert found == [(item.samples.tolist(), item.shared, item.size) for item in (one, two, three)]


@pytest.mark.parametrize(
    ("alike", "learned_from", "expected"),
    [
        (LEAST_SHARED - 1, 35, 0),
        (LEAST_SHARED, 35, LEAST_SHARED),
        (40, LEAST_SHARED, 0),
        (40, LEAST_SHARED + 1, LEAST_SHARED),
        (40, 35, 34),
    ],
)
def test_the_least_that_is_shared(tmp_path: Path, alike: int, learned_from: int, expected: int) -> None:
    """Tokens alike at the beginning, all before the last that is not learned."""
    leader = np.arange(60, dtype=np.int32)
    other = np.concatenate((leader[:alike], leader[alike:40] + 100)).astype(np.int32)
    spans = [
        Spans(other, np.array([[learned_from, 40]], dtype=np.int32)),
        Spans(leader, np.array([[50, 60]], dtype=np.int32)),
    ]
    [family] = families(np.arange(2), store_at(tmp_path, [spans]), 1000)
    assert family.shared == (0, expected)


def test_the_place_before_the_first_answer_token_is_never_shared(tmp_path: Path) -> None:
    """Two answers to one question: the samples differ only in what is learned."""
    ids = np.arange(40, dtype=np.int32)
    other = np.concatenate((ids[:30], ids[30:] + 50)).astype(np.int32)
    learned = np.array([[30, 40]], dtype=np.int32)
    store = store_at(tmp_path, [[Spans(ids, learned), Spans(other, learned)]])
    assert families(np.arange(2), store, 100)[0].shared == (0, 29)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("capacity", [100, 330, 10_000])
def test_loss_and_gradients_are_those_of_every_sample_alone(
    store: SampleStore, tokenizer: Yuan2Tokenizer, capacity: int, checkpointing: bool
) -> None:
    config = Yuan2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        eod_token=tokenizer.eod_id,
        sep_token=tokenizer.sep_id,
    )
    model = random_model(config, seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    usable = np.flatnonzero(store.lengths <= capacity)

    def gradients(rows: list[np.ndarray]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for row in rows:
            micro = collate(store, [row], 0, capacity)
            names = ("document_ids", "previous_ids")
            optional = {n: getattr(micro, n) for n in names if getattr(micro, n) is not None}
            arrays = {"input_ids": micro.input_ids, "labels": micro.labels, **optional}
            loss = model(
                **{name: torch.from_numpy(array) for name, array in arrays.items()},
                use_cache=False,
                return_logits=False,
                loss_reduction="sum",
            ).loss
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = gradients([usable[i : i + 1] for i in range(len(usable))])
    packed = gradients(
        [row for rows in cut_batch(usable, store, 4, capacity, 1, packing=True) for row in rows]
    )
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    for name, wanted in alone[1].items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(packed[1][name], wanted, atol=1e-5 * scale, rtol=1e-5, msg=name)
