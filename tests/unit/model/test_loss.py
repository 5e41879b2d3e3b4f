"""The chunked loss is plain cross-entropy, gradients included, and holds no more than a chunk of logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from yuan2_model import Yuan2ForCausalLM
from yuan2_model.loss import labelled_loss_sum, shifted_labels

pytestmark = pytest.mark.numbers


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 11), generator=generator)
    labels[torch.rand(3, 11, generator=generator) < 0.4] = -100
    return hidden, weight, labels


def plain_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float().flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk", [None, 1, 4, 1000])
def test_sum_count_and_gradients_are_those_of_cross_entropy(chunk: int | None) -> None:
    hidden, weight, labels = make_inputs()
    loss = labelled_loss_sum(hidden, weight, labels, chunk)
    assert loss.labelled == int((labels != -100).sum())
    wanted = plain_sum(hidden, weight, labels)
    torch.testing.assert_close(loss.total, wanted)
    found = torch.autograd.grad(loss.total * 3, (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(wanted * 3, (hidden, weight)))
    torch.testing.assert_close(loss.mean() * loss.labelled, loss.total)


def test_bf16_gradients_stay_near_those_of_fp32() -> None:
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss = labelled_loss_sum(hidden, weight, labels, 3)
    assert loss.total.dtype == torch.float32
    exact = tuple(x.detach().float().requires_grad_() for x in (hidden, weight))
    wanted = plain_sum(*exact, labels)
    torch.testing.assert_close(loss.total, wanted, rtol=2e-2, atol=0)
    for found, right in zip(
        torch.autograd.grad(loss.total, (hidden, weight)), torch.autograd.grad(wanted, exact), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - right).norm() / right.norm()) < 2e-2


def test_the_scale_of_a_loss_is_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.5 + 2^-8 lies half-way between two numbers of bf16: rounded, it changes all gradients by 0.26%."""
    monkeypatch.setattr("yuan2_model.loss._SCALED_AT_ONCE", 16 * 7)  # several parts
    hidden, weight, labels = make_inputs(torch.bfloat16)
    plain, scaled = (
        torch.autograd.grad(labelled_loss_sum(hidden, weight, labels).total * factor, (hidden, weight))
        for factor in (1.0, 1.5 + 2**-8)
    )
    for one, other in zip(plain, scaled, strict=True):
        ratio = (one.double() * other.double()).sum() / one.double().square().sum()
        assert float(ratio) == pytest.approx(1.5 + 2**-8, abs=2**-10)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_asked_gradients_are_made(frozen: str) -> None:
    hidden, weight, labels = make_inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    labelled_loss_sum(hidden, weight, labels).total.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_gradients_are_given_out_once() -> None:
    hidden, weight, labels = make_inputs()
    loss = labelled_loss_sum(hidden, weight, labels)
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.total.backward()


def test_nothing_labelled_costs_nothing_and_keeps_the_graph() -> None:
    hidden, weight, labels = make_inputs()
    loss = labelled_loss_sum(hidden, weight, torch.full_like(labels, -100))
    assert (loss.total.item(), loss.mean().item(), loss.labelled) == (0.0, 0.0, 0)
    loss.total.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_of_one_chunk_at_most_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from yuan2_model import loss as module

    seen = []
    real = module._losses_and_softmax
    monkeypatch.setattr(
        module,
        "_losses_and_softmax",
        lambda logits, *others: (seen.append(tuple(logits.shape)), real(logits, *others))[1],
    )
    hidden, weight, labels = make_inputs()
    count = labelled_loss_sum(hidden, weight, labels, 4).labelled
    assert sum(rows for rows, _ in seen) == count
    assert max(rows for rows, _ in seen) == 4


def test_labels_shift_by_one_and_starts_are_not_learned() -> None:
    labels = torch.tensor([[1, 2, 3, 4]])
    starts = torch.tensor([2])
    assert shifted_labels(labels).tolist() == [[2, 3, 4, -100]]
    assert shifted_labels(labels, starts).tolist() == [[2, -100, 4, -100]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_model_without_logits_has_the_loss_and_gradients_of_the_model_with(
    model: Yuan2ForCausalLM, sequences: list[Tensor], reduction: str
) -> None:
    ids = sequences[2][None]
    labels = ids.masked_fill(ids < 30, -100)
    results = []
    for logits in (True, False):
        model.zero_grad()
        output = model(
            input_ids=ids, labels=labels, loss_reduction=reduction, return_logits=logits, loss_chunk=3
        )
        output.loss.backward()
        results.append((output.loss, output.labelled, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_behind_the_last_attention_only_learned_tokens_are_computed(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids = torch.stack([sequences[2], sequences[2].flip(0)])
    labels = ids.masked_fill(ids < 30, -100)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output[..., 0].numel()))
    learned = int((shifted_labels(labels) != -100).sum())
    model(input_ids=ids, labels=labels, return_logits=False)
    assert 0 < learned < ids.numel()
    assert seen == [*[ids.numel()] * (len(model.model.layers) - 1), learned]
    states = model(input_ids=ids, labels=labels, return_logits=False, output_hidden_states=True).hidden_states
    assert {state.shape[:2] for state in states} == {ids.shape}


def test_without_a_label_there_is_no_loss_and_no_gradient(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids = sequences[2][None]
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), return_logits=False).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"return_logits": False}, "needs labels"),
        ({"loss_reduction": "none"}, "must be one of mean, sum, found"),
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": torch.zeros(1, 9, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep"),
        ({"inputs_embeds": torch.zeros(1, 9, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    model: Yuan2ForCausalLM, sequences: list[Tensor], arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model(input_ids=sequences[0][None], **arguments)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_that_of_torch(smoothing: float) -> None:
    hidden, weight, labels = make_inputs()
    found = labelled_loss_sum(hidden, weight, labels, 3, smoothing=smoothing).total
    gradients = torch.autograd.grad(found * 1.7, (hidden, weight))
    logits = (hidden @ weight.T).flatten(0, 1)
    wanted = cross_entropy(
        logits, labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(wanted * 1.7, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_labels_are_smoothed_in_training_alone_with_and_without_logits(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids = sequences[0][None]

    def losses() -> list[float]:
        found = (model(ids, labels=ids, return_logits=kept, use_cache=False).loss for kept in (True, False))
        return [float(loss.detach()) for loss in found]

    plain = losses()
    model.label_smoothing = 0.2
    try:
        assert losses() == plain
        model.train()
        smoothed = losses()
    finally:
        model.label_smoothing = 0.0
        model.eval()
    assert smoothed[0] == pytest.approx(smoothed[1], abs=1e-5)
    assert abs(smoothed[0] - plain[0]) > 1e-4
