"""In a packed row every document sees itself only: attention, positions, filter and labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yuan2_model import Yuan2ForCausalLM, attention, random_model

from .conftest import make_config

pytestmark = pytest.mark.numbers


def packed(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One row of all sequences and its document ids."""
    ids = torch.cat(sequences)[None]
    documents = torch.cat([torch.full((len(s),), n) for n, s in enumerate(sequences)])[None]
    return ids, documents


@pytest.fixture(params=["looped", "masked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to isolate documents, whatever their length."""
    monkeypatch.setattr(attention, "SHORTEST_LOOPED", 0 if request.param == "looped" else 1_000_000)
    return str(request.param)


@torch.no_grad()
def test_packed_logits_are_those_of_the_sequences_alone(
    model: Yuan2ForCausalLM, sequences: list[Tensor], path: str
) -> None:
    ids, documents = packed(sequences)
    logits = model(input_ids=ids, document_ids=documents).logits[0]
    alone = torch.cat([model(input_ids=s[None]).logits[0] for s in sequences])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("return_logits", [True, False])
def test_packed_loss_and_gradients_are_those_of_the_sequences_alone(
    model: Yuan2ForCausalLM, sequences: list[Tensor], path: str, return_logits: bool
) -> None:
    """Every token is labelled: a document's first label must not be asked of its neighbour's last token."""
    ids, documents = packed(sequences)
    output = model(
        input_ids=ids,
        labels=ids,
        document_ids=documents,
        loss_reduction="sum",
        return_logits=return_logits,
        loss_chunk=7,
    )
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.stack(
        [model(input_ids=s[None], labels=s[None], loss_reduction="sum").loss for s in sequences]
    )
    alone.sum().backward()
    assert output.labelled == sum(len(s) - 1 for s in sequences)
    torch.testing.assert_close(output.loss, alone.sum(), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5 * scale, rtol=1e-5, msg=name)


@torch.no_grad()
def test_rows_of_several_documents_and_padding_at_the_end(
    model: Yuan2ForCausalLM, sequences: list[Tensor], path: str
) -> None:
    first, second = sequences[:2], sequences[2:4]
    rows = [packed(first), packed(second)]
    width = 18
    ids = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=5) for row, _ in rows])
    # The padding carries its neighbour's id: the mask alone tells it apart.
    documents = torch.cat(
        [torch.nn.functional.pad(d, (0, width - d.shape[1]), value=int(d[0, -1])) for _, d in rows]
    )
    mask = torch.cat([(torch.arange(width) < row.shape[1])[None] for row, _ in rows])
    logits = model(input_ids=ids, document_ids=documents, attention_mask=mask).logits
    for row, members in enumerate((first, second)):
        alone = torch.cat([model(input_ids=s[None]).logits[0] for s in members])
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), data=st.data())
@torch.no_grad()
def test_any_packing_is_isolated(lengths: list[int], data: st.DataObject) -> None:
    model = random_model(make_config(num_hidden_layers=1), seed=data.draw(st.integers(0, 3)))
    sequences = [torch.randint(0, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids, documents = packed(sequences)
    logits = model(input_ids=ids, document_ids=documents).logits[0]
    alone = torch.cat([model(input_ids=s[None]).logits[0] for s in sequences])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_documents_with_a_cache_are_refused(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    ids, documents = packed(sequences)
    with pytest.raises(ValueError, match="document_ids cannot be combined with a cache"):
        model(input_ids=ids, document_ids=documents, use_cache=True)


def test_documents_of_a_wrong_shape_are_refused(model: Yuan2ForCausalLM, sequences: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        model(input_ids=sequences[0][None], document_ids=torch.zeros(1, 3, dtype=torch.long))
