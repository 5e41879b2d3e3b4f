"""A sequence's outputs do not depend on what it is batched with or on which side it is padded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from yuan2_model import Yuan2ForCausalLM

pytestmark = pytest.mark.numbers

SIDES = ("left", "right")


def padded(sequences: list[Tensor], side: str, fill: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, T] each."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("fill", [90, 5])
@pytest.mark.parametrize("side", SIDES)
def test_padded_batch_gives_each_sequences_own_logits(
    model: Yuan2ForCausalLM, sequences: list[Tensor], side: str, fill: int
) -> None:
    ids, mask = padded(sequences, side, fill)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, sequence in enumerate(sequences):
        alone = model(input_ids=sequence[None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_right_padding_needs_no_mask_for_the_real_tokens(
    model: Yuan2ForCausalLM, sequences: list[Tensor]
) -> None:
    ids, mask = padded(sequences, "right", 90)
    masked = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids).logits[mask.bool()], masked[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("side", [*SIDES, "both"])
def test_padding_on_any_side_of_a_row_is_invisible(
    model: Yuan2ForCausalLM, sequences: list[Tensor], side: str
) -> None:
    before, after = {"left": (3, 0), "right": (0, 4), "both": (2, 3)}[side]
    sequence = sequences[0]
    ids = torch.cat((torch.full((before,), 7), sequence, torch.full((after,), 8)))[None]
    mask = torch.zeros_like(ids)
    mask[:, before : before + len(sequence)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[0, before : before + len(sequence)]
    torch.testing.assert_close(logits, model(input_ids=sequence[None]).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mask_later", [True, False], ids=["mask given", "mask remembered"])
@pytest.mark.parametrize("side", SIDES)
def test_cached_decoding_of_a_padded_batch_equals_single_sequences(
    model: Yuan2ForCausalLM, sequences: list[Tensor], side: str, mask_later: bool
) -> None:
    ids, mask = padded(sequences, side, 90)
    tail = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35], [8, 9, 79, 3], [2, 38, 46, 2], [6, 43, 38, 3]])
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    steps = []
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        mask = torch.cat((mask, mask.new_ones(len(sequences), stop - start)), dim=1)
        output = model(
            input_ids=tail[:, start:stop],
            attention_mask=mask if mask_later else None,
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(output.logits)
    logits = torch.cat(steps, dim=1)
    for row, sequence in enumerate(sequences):
        alone = model(input_ids=torch.cat((sequence, tail[row]))[None]).logits[0, len(sequence) :]
        torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", [(1, 13), (5, 5, 4), (1,) * 14])
def test_padded_prefill_in_chunks_equals_one_call(
    model: Yuan2ForCausalLM, sequences: list[Tensor], side: str, sizes: tuple[int, ...]
) -> None:
    ids, mask = padded(sequences, side, 90)
    whole = model(input_ids=ids, attention_mask=mask).logits
    cache, chunks = None, []
    for part, part_mask in zip(ids.split(list(sizes), 1), mask.split(list(sizes), 1), strict=True):
        output = model(input_ids=part, attention_mask=part_mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    logits = torch.cat(chunks, dim=1)
    torch.testing.assert_close(logits[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_loss_and_gradients_of_a_padded_batch_are_the_sum_over_its_sequences(
    model: Yuan2ForCausalLM, sequences: list[Tensor], side: str
) -> None:
    ids, mask = padded(sequences, side, 90)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, loss_reduction="sum").loss
    loss.backward()
    batched = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    singles = [model(input_ids=s[None], labels=s[None], loss_reduction="sum").loss for s in sequences]
    torch.stack(singles).sum().backward()
    torch.testing.assert_close(loss, torch.stack(singles).sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(batched[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("mask_shape", "words"), [((1, 5), "expected \\(1, 9\\)"), ((1, 1, 9, 5), "expected \\(1, 1, 9, 9\\)")]
)
def test_mask_of_a_wrong_shape_is_refused(
    model: Yuan2ForCausalLM, sequences: list[Tensor], mask_shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model(input_ids=sequences[0][None], attention_mask=torch.zeros(mask_shape))
