"""What only a GPU can show of the model, with figures: `make gpu-check`. The same runs tiny on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from yuan2_core.estimate import Run, Shape, find_gpu
from yuan2_core.estimate.memory import gpu_memory
from yuan2_model import Yuan2Config, Yuan2ForCausalLM
from yuan2_model.attention import describe
from yuan2_model.flops import causal_pairs, model_flops
from yuan2_model.rows import Rows, prepare_rows

NO_GPU = "no GPU here: `make gpu-check` runs it where there is one"


@dataclass(frozen=True)
class Side:
    """A device, and a model and rows that suit it."""

    device: torch.device
    dtype: torch.dtype
    hidden: int
    layers: int
    length: int
    vocabulary: int

    def model(self) -> Yuan2ForCausalLM:
        """Random weights, made where they stay."""
        config = Yuan2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            max_position_embeddings=2 * self.length,
            eod_token=1,
            sep_token=2,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            return Yuan2ForCausalLM(config).to(self.dtype).train()

    def rows(self, documents: int) -> Rows:
        """A row of documents of one length, every token of them learned."""
        ids = torch.randint(3, self.vocabulary, (1, self.length), generator=torch.Generator().manual_seed(1))
        numbers = torch.arange(self.length).unsqueeze(0) // (self.length // documents)
        return prepare_rows(ids, ids, torch.ones_like(ids), numbers, device=self.device, dtype=self.dtype)


TINY = Side(torch.device("cpu"), torch.float32, hidden=128, layers=2, length=64, vocabulary=256)
YUAN2_2B = Side(torch.device("cuda"), torch.bfloat16, hidden=2048, layers=24, length=2048, vocabulary=135040)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
SIDES = [pytest.param(TINY, id="tiny"), pytest.param(YUAN2_2B, id="2B", marks=GPU)]


def loss_of(model: Yuan2ForCausalLM, rows: Rows) -> Tensor:
    return model(rows=rows, use_cache=False, return_logits=False, loss_reduction="sum").loss


@pytest.mark.parametrize("side", SIDES)
def test_packed_documents_have_the_loss_of_each_alone(side: Side, capsys: pytest.CaptureFixture[str]) -> None:
    """With whatever computes attention here; in bf16 a sum of many rounded losses is off by far less than
    one of them."""
    model, documents = side.model(), 4
    rows = side.rows(documents)
    with torch.no_grad():
        packed = loss_of(model, rows).item()
        parts = rows.input_ids.view(documents, -1)
        alone = sum(
            model(input_ids=part[None], labels=part[None], use_cache=False, loss_reduction="sum").loss.item()
            for part in parts
        )
    with capsys.disabled():
        print(f"\n  {describe(side.device, side.dtype)}: {packed:.3f} packed, {alone:.3f} alone")
    assert packed == pytest.approx(alone, rel=1e-5 if side.dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("side", SIDES)
def test_greedy_decoding_goes_on_as_the_whole_sequence_does(side: Side) -> None:
    """Logits after a token with the cache and without, within what the type rounds."""
    model = side.model().eval()
    ids = side.rows(1).input_ids[:, :32]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        before = model(input_ids=ids[:, :-1], use_cache=True)
        cached = model(input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True)
    difference = float((cached.logits[:, -1].float() - whole).norm() / whole.norm())
    assert difference < (1e-5 if side.dtype == torch.float32 else 2**-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_no_micro_batch_waits_for_the_gpu() -> None:
    model, rows = YUAN2_2B.model(), YUAN2_2B.rows(8)
    loss_of(model, rows).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(model, rows).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_a_pass_of_2b_takes_the_memory_of_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, gradients, activations and loss of one GPU; the optimizer is DeepSpeed's and not here."""
    model, rows = YUAN2_2B.model(), YUAN2_2B.rows(8)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.cuda.reset_peak_memory_stats()
    loss_of(model, rows).backward()
    found = torch.cuda.max_memory_allocated()
    run = Run(Shape.of(model.config.dimensions()), "full", 2, YUAN2_2B.length, 1, 1, 1)
    memory = gpu_memory(run)
    expected = memory.weights + memory.gradients + memory.activations + memory.working
    with capsys.disabled():
        print(f"\n  {found / 1e9:.2f} GB of a pass, {expected / 1e9:.2f} GB estimated")
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("side", SIDES)
def test_model_flops_utilisation(side: Side, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure, and no timed verdict; the goal on an H100 is 0.45 of its dense bf16 peak."""
    model, rows = side.model(), side.rows(1)
    for _ in range(2):
        loss_of(model, rows).backward()
    _wait(side)
    began, passes = time.perf_counter(), 3
    for _ in range(passes):
        loss_of(model, rows).backward()
    _wait(side)
    seconds = (time.perf_counter() - began) / passes
    labelled = rows.next_1L.numel()
    flops = model_flops(model.config.dimensions(), side.length, causal_pairs([side.length]), labelled)
    gpu = find_gpu(torch.cuda.get_device_name()) if side.device.type == "cuda" else None
    share = "" if gpu is None else f", {flops / seconds / gpu.bf16_flops:.2f} of the peak of {gpu.name}"
    with capsys.disabled():
        print(f"\n  {flops / seconds / 1e12:.3g} TFLOP/s of the model{share}")
    assert flops > 6 * side.layers * 12 * side.hidden**2 * labelled


def _wait(side: Side) -> None:
    if side.device.type == "cuda":
        torch.cuda.synchronize()
