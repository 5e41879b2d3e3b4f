"""The model against the reference implementation's outputs on a tiny published checkpoint (fp32, 1e-4)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from yuan2_model import Yuan2ForCausalLM, load_model

pytestmark = pytest.mark.numbers

GOLDEN = Path(__file__).parent / "yuan2-tiny"
TOLERANCE = 1e-4
PROMPT = 29


@pytest.fixture(scope="module")
def model() -> Yuan2ForCausalLM:
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_logits_and_loss_are_the_references(model: Yuan2ForCausalLM, expected: dict[str, Tensor]) -> None:
    output = model(input_ids=expected["input_ids"], labels=expected["labels"])
    assert_close(output.logits, expected["logits"])
    assert_close(output.loss, expected["loss"][0])


@torch.no_grad()
def test_chunked_loss_is_the_references(model: Yuan2ForCausalLM, expected: dict[str, Tensor]) -> None:
    output = model(
        input_ids=expected["input_ids"], labels=expected["labels"], return_logits=False, loss_chunk=10
    )
    assert output.logits is None
    assert_close(output.loss, expected["loss"][0])


@torch.no_grad()
def test_decoding_token_by_token_gives_the_references_logits(
    model: Yuan2ForCausalLM, expected: dict[str, Tensor]
) -> None:
    ids = expected["input_ids"]
    output = model(input_ids=ids[:, :PROMPT], use_cache=True)
    steps = [output.logits[:, -1]]
    for column in range(PROMPT, ids.shape[1]):
        output = model(
            input_ids=ids[:, column : column + 1], past_key_values=output.past_key_values, use_cache=True
        )
        steps.append(output.logits[:, -1])
    assert_close(torch.stack(steps, dim=1), expected["logits"][:, PROMPT - 1 :])
    assert_close(torch.stack(steps[-9:], dim=1), expected["decode_logits"])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 37, (36, 1), (1, 36), (2, 1, 3, 31), (20, 17)])
def test_prefill_in_any_split_gives_the_references_logits(
    model: Yuan2ForCausalLM, expected: dict[str, Tensor], sizes: tuple[int, ...]
) -> None:
    cache, chunks = None, []
    for chunk in expected["input_ids"].split(list(sizes), dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    assert_close(torch.cat(chunks, dim=1), expected["logits"])


@torch.no_grad()
def test_attention_blocked_across_eod_gives_the_references_logits(
    model: Yuan2ForCausalLM, expected: dict[str, Tensor]
) -> None:
    """In the reference path only attention is blocked: positions run on and the filter still sees across."""
    ids = expected["input_ids_eod"]
    ends = (ids == model.config.eod_token).long()
    run = ends.cumsum(dim=1) - ends
    visible = (run[:, :, None] == run[:, None, :]).tril().unsqueeze(1)
    assert_close(model(input_ids=ids, attention_mask=visible).logits, expected["logits_eod_blocked"])


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gradient_norms_are_the_references(
    expected: dict[str, Tensor], return_logits: bool, checkpointing: bool | None
) -> None:
    model = load_model(GOLDEN).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = model(
        input_ids=expected["input_ids"],
        labels=expected["labels"],
        use_cache=False,
        return_logits=return_logits,
        loss_chunk=16,
    ).loss
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    wanted = json.loads((GOLDEN / "grad_norms.json").read_text())
    assert norms.keys() == wanted.keys()
    assert norms == pytest.approx(wanted, abs=TOLERANCE)
