"""Sequences with the same beginning, which is in the row once, give what they give alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yuan2_model import Yuan2ForCausalLM, attention, random_model
from yuan2_model.attention import Segment, attend, plan_segments, plan_varlen, uses_flash

from .conftest import make_config

pytestmark = pytest.mark.numbers

TOLERANCE = 1e-5


def varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> Tensor:
    """What flash_attn documents of its function, its causal mask aligned with the last key."""
    assert causal
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        mine = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        scores = torch.einsum("qnd,knd->nqk", mine, keys) * mine.shape[-1] ** -0.5
        hidden = torch.ones(len(mine), len(keys), dtype=torch.bool).triu(len(keys) - len(mine) + 1)
        outputs.append(
            torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        )
    return torch.cat(outputs)


@pytest.fixture(params=["looped", "masked", "varlen"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to isolate segments, whatever their length; flash_attn's by its documented contract."""
    monkeypatch.setattr(attention, "SHORTEST_LOOPED", 1_000_000 if request.param == "masked" else 0)
    if request.param == "varlen":
        flash = SimpleNamespace(flash_attn_varlen_func=varlen_reference, __version__="2.1.0")
        monkeypatch.setitem(sys.modules, "flash_attn", flash)
        monkeypatch.setattr(attention, "uses_flash", lambda device, dtype: True)
    return str(request.param)


def joined(trunk: Tensor, branches: list[tuple[int, Tensor]], place: int = 0) -> tuple[Tensor, Tensor]:
    """A trunk and what continues its first tokens, as a row from column `place` on; tokens and previous."""
    tokens, previous = [trunk], [torch.arange(-1, len(trunk) - 1) + place]
    previous[0][0] = -1
    column = place + len(trunk)
    for seen, own in branches:
        tokens.append(own)
        previous.append(torch.arange(column - 1, column + len(own) - 1))
        previous[-1][0] = place + seen - 1 if seen else -1
        column += len(own)
    return torch.cat(tokens), torch.cat(previous)


def with_labels(seen: int, own: Tensor, sequence: Tensor) -> Tensor:
    """Labels of a branch: all of its own tokens but the first, whose place several tokens predict."""
    labels = torch.full_like(sequence, -100)
    labels[seen + 1 :] = own[1:]
    return labels


@pytest.fixture
def family(sequences: list[Tensor]) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """A trunk of 14 tokens, and branches from its first, its middle and its last token."""
    return sequences[2], [(1, sequences[0]), (8, sequences[4]), (14, sequences[3]), (8, sequences[3])]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_sequences_alone(
    model: Yuan2ForCausalLM,
    family: tuple[Tensor, list[tuple[int, Tensor]]],
    sequences: list[Tensor],
    path: str,
    checkpointing: bool,
) -> None:
    """Two rows: a family after another sequence, and a family with padding behind it."""
    trunk, branches = family
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    first = sequences[0]
    tokens, previous = joined(trunk, branches, place=len(first))
    rows = [torch.cat((first, tokens)), tokens]
    befores = [torch.cat((torch.arange(-1, len(first) - 1), previous)), joined(trunk, branches)[1]]
    own = torch.cat([trunk, *(torch.cat((torch.tensor([-100]), x[1:])) for _, x in branches)])
    marks = [torch.cat((first, own)), own]
    width = len(rows[0])
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(row, (0, width - len(row)), value=90) for row in rows])
    labels = torch.stack([pad(row, (0, width - len(row)), value=-100) for row in marks])
    previous_ids = torch.stack([befores[0], torch.cat((befores[1], torch.arange(len(tokens), width) - 1))])
    previous_ids[1, len(tokens)] = -1
    output = model(
        input_ids=ids, labels=labels, previous_ids=previous_ids, loss_reduction="sum", return_logits=False
    )
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    alone = [model(input_ids=first[None], labels=first[None], loss_reduction="sum").loss]
    for _ in range(2):
        alone.append(model(input_ids=trunk[None], labels=trunk[None], loss_reduction="sum").loss)
        for seen, x in branches:
            sequence = torch.cat((trunk[:seen], x))
            marked = with_labels(seen, x, sequence)
            alone.append(model(input_ids=sequence[None], labels=marked[None], loss_reduction="sum").loss)
    total = torch.stack(alone).sum()
    total.backward()
    torch.testing.assert_close(output.loss, total, atol=TOLERANCE, rtol=TOLERANCE)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name], parameter.grad, atol=TOLERANCE * scale, rtol=TOLERANCE, msg=name
        )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=st.integers(1, 12))
@torch.no_grad()
def test_any_family_is_isolated(data: st.DataObject, size: int) -> None:
    model = random_model(make_config(num_hidden_layers=1), seed=0)
    generator = torch.Generator().manual_seed(size)
    shapes = data.draw(st.lists(st.tuples(st.integers(0, size), st.integers(1, 9)), max_size=5))
    trunk = torch.randint(0, 90, (size,), generator=generator)
    branches = [(seen, torch.randint(0, 90, (own,), generator=generator)) for seen, own in shapes]
    tokens, previous = joined(trunk, branches)
    logits = model(input_ids=tokens[None], previous_ids=previous[None]).logits[0]
    place = size
    torch.testing.assert_close(
        logits[:size], model(input_ids=trunk[None]).logits[0], atol=TOLERANCE, rtol=TOLERANCE
    )
    for seen, own in branches:
        alone = model(input_ids=torch.cat((trunk[:seen], own))[None]).logits[0, seen:]
        torch.testing.assert_close(logits[place : place + len(own)], alone, atol=TOLERANCE, rtol=TOLERANCE)
        place += len(own)


def test_a_branch_of_a_branch_or_of_a_later_sequence_is_refused(model: Yuan2ForCausalLM) -> None:
    ids = torch.arange(6)[None]
    for previous in ([-1, 0, 0, 2, 2, 4], [-1, 3, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match="previous_ids"):
            model(input_ids=ids, previous_ids=torch.tensor([previous]))


def test_documents_and_previous_ids_exclude_each_other(model: Yuan2ForCausalLM) -> None:
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="give one"):
        model(input_ids=ids, previous_ids=ids - 1, document_ids=ids)


SEGMENTS = [Segment(40), Segment(17), Segment(20, 0, 33), Segment(3), Segment(48, 1, 17)]


def test_flash_is_for_gpus_and_16_bits_only() -> None:
    assert not uses_flash(torch.device("cpu"), torch.bfloat16)
    assert not uses_flash(torch.device("cuda"), torch.float32)


def test_the_log_names_what_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.describe(torch.device("cpu"), torch.bfloat16).startswith("torch's scaled dot product")
    monkeypatch.setattr(attention, "flash_attn_version", lambda: (2, 5))
    assert attention.describe(torch.device("cuda"), torch.bfloat16).startswith("flash_attn 2.5")
    assert attention.describe(torch.device("cuda"), torch.float32).startswith("torch's")


@pytest.mark.parametrize(
    ("version", "found"), [("2.0.9", None), ("2.1.0.post1", (2, 1)), ("2.10.3", (2, 10)), (None, None)]
)
def test_an_old_flash_attn_is_not_used(
    monkeypatch: pytest.MonkeyPatch, version: str | None, found: tuple[int, ...] | None
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", version and SimpleNamespace(__version__=version))
    attention.flash_attn_version.cache_clear()
    assert attention.flash_attn_version() == found
    attention.flash_attn_version.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not attention.flash_attn_version(), reason="needs a GPU and flash_attn"
)
def test_flash_attn_computes_what_sdpa_does() -> None:
    """docs/gpu-checklist.md has the command."""
    device, size = torch.device("cuda"), sum(segment.length for segment in SEGMENTS)
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, size // 2, 4, 64, device=device, dtype=torch.bfloat16).unbind()
    plan = plan_segments(SEGMENTS, q[..., 0, 0], torch.bfloat16)
    assert plan.varlen is not None
    results = []
    for chosen, dtype in (
        (plan, torch.bfloat16),
        (attention.AttentionPlan(segments=plan.segments), torch.float32),
    ):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs, chosen)
        results.append([x.float() for x in (output, *torch.autograd.grad(output, inputs, grad.to(dtype)))])
    for flash, exact in zip(*results, strict=True):
        torch.testing.assert_close(flash, exact, atol=3e-2, rtol=3e-2)


def test_varlen_plan_lists_each_segments_keys() -> None:
    plan = plan_varlen([Segment(3), Segment(2, 0, 2), Segment(1)], torch.device("cpu"))
    assert plan.query_ends.tolist() == [0, 3, 5, 6]
    assert plan.key_ends.tolist() == [0, 3, 7, 8]
    assert plan.keys_K is not None
    assert plan.keys_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert (plan.most_queries, plan.most_keys) == (3, 4)
    assert plan_varlen([Segment(3), Segment(2)], torch.device("cpu")).keys_K is None
