"""NEFTune's noise: its size by sequence, packed or padded, and only in training."""

from __future__ import annotations

import pytest
import torch

from yuan2_model import Yuan2Config, random_model
from yuan2_model.layout import lay_out
from yuan2_model.noise import noise

ALPHA = 5.0


def largest(x: torch.Tensor, alpha: float, **layout: torch.Tensor) -> torch.Tensor:
    """Of the noise on each token, in sizes of alpha / sqrt(H)."""
    given = {"attention_mask": None, "position_ids": None, "document_ids": None, **layout}
    found = noise(x, lay_out(x, None, **given), alpha)
    return found.abs().amax(dim=2) * x.shape[2] ** 0.5 / alpha


def test_the_noise_of_a_token_follows_from_the_length_of_its_sequence() -> None:
    x = torch.zeros(2, 12, 4096)
    documents = torch.tensor([[0] * 9 + [1] * 3, [0] * 4 + [1] * 4 + [-1] * 4])
    mask = (documents >= 0).long()
    packed = largest(x, ALPHA, document_ids=documents, attention_mask=mask)
    lengths = torch.tensor([9.0] * 9 + [3.0] * 3)
    assert packed[0].tolist() == pytest.approx((lengths**-0.5).tolist(), rel=0.01)
    assert packed[1, :8].tolist() == pytest.approx([0.5] * 8, rel=0.01)
    padded = largest(x[:1], ALPHA, attention_mask=torch.tensor([[1] * 9 + [0] * 3]))
    assert padded[0, :9].tolist() == pytest.approx([9**-0.5] * 9, rel=0.01)


def test_noise_is_drawn_in_training_alone_and_anew_from_the_same_seed() -> None:
    config = Yuan2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        eod_token=95,
    )
    model = random_model(config, 0)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        plain = model.eval()(ids).logits
        model.model.noise_alpha = ALPHA
        assert torch.equal(model(ids).logits, plain)
        model.train()
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(model(ids, use_cache=False).logits)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], plain, atol=1e-3)
