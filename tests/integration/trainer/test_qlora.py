"""QLoRA is LoRA beside the weights that its 4 bits stand for, judged in one process: on any processor alike.

Three models with the adapter of a run that was trained in 4 bits: that run's own, LoRA beside the dequantised
weights, and LoRA beside the plain ones, which must not pass for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.rounding import rounding_distance
from tests.support.training import losses, make_job, write_model
from yuan2_core.contract import TrainJob
from yuan2_model import Yuan2ForCausalLM, load_model, save_model
from yuan2_trainer.model.adapters import is_adapter, published_name
from yuan2_trainer.model.loading import load_for_training
from yuan2_trainer.model.methods import BLOCK
from yuan2_trainer.model.precision import check_model
from yuan2_trainer.model.quantised import dequantised, is_quantised
from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.pod.preflight import check_job
from yuan2_trainer.pod.workspace import Workspace

pytestmark = pytest.mark.numbers

Train = Callable[..., Path]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MATRICES = [*ALL, "conv1", "conv2"]
ADAPTER = {"dropout": 0.0, "target_modules": ALL}
QLORA: dict[str, Any] = {"method": {"qlora": ADAPTER}, "precision": "bf16", "learning_rate": 1e-2}
LORA: dict[str, Any] = {"method": {"lora": ADAPTER}, "precision": "bf16"}

LARGEST_STEP = (1 - 0.6961928009986877) / 2
"""Half the widest gap between two values of nf4 (QLoRA, arXiv 2305.14314, appendix E): -1 and -0.696."""
SCALE_ERROR = 0.02
"""Of a scale that is itself in 8 bits: those hold its difference to the mean scale, less than the scale is,
in steps of at most 0.9/64 of the largest (dynamic type, arXiv 1511.04561), and it is off by half a step."""
TO_BF16 = 2.0**-8
"""Half a unit in the last place, relative: the dequantised value is rounded to bf16."""


@dataclass(frozen=True)
class Models:
    four_bits: Yuan2ForCausalLM
    dequantised: Yuan2ForCausalLM
    plain: Yuan2ForCausalLM
    base: dict[str, Tensor]
    """The plain weights in bf16, by published name."""
    stand_for: dict[str, Tensor]
    """What those of 4 bits stand for."""
    adapter: dict[str, Tensor]
    """As it was trained, by PEFT's names."""


@pytest.fixture(scope="module")
def output(trained: Train) -> Path:
    return trained(**QLORA)


@pytest.fixture(scope="module")
def models(output: Path, wide_inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """In training mode, with the trained adapter; only that has gradients."""
    directory = tmp_path_factory.mktemp("dequantised")
    four_bits = load_for_training(job_of(wide_inputs[0], **QLORA))
    by_name = {published_name(name): item for name, item in four_bits.named_parameters()}
    base = load_model(wide_inputs[0], dtype=torch.bfloat16)
    plain = {name: item.detach().clone() for name, item in base.named_parameters()}
    stand_for = {
        name: dequantised(by_name[name], item.shape) for name, item in plain.items() if is_quantised(name)
    }
    save_model({**plain, **stand_for}, base.config, directory)
    made = Models(
        four_bits=four_bits,
        dequantised=load_for_training(job_of(directory, **LORA)),
        plain=load_for_training(job_of(wide_inputs[0], **LORA)),
        base=plain,
        stand_for=stand_for,
        adapter=load_file(output / "adapter" / "adapter_model.safetensors"),
    )
    for model in (made.four_bits, made.dequantised, made.plain):
        put_adapter(model, made.adapter)
    return made


def put_adapter(model: Yuan2ForCausalLM, adapter: dict[str, Tensor]) -> None:
    """Give a model an adapter, ready to train."""
    for name, parameter in model.train().named_parameters():
        if is_adapter(name):
            parameter.data.copy_(adapter[f"base_model.model.{name.replace('.default', '')}"])


def job_of(model: Path, **changes: Any) -> TrainJob:
    return make_job(model, Path("/d"), Path("/o"), stage=0, **changes)


def token_losses(model: Yuan2ForCausalLM) -> Tensor:
    """Mean loss of each of six sequences."""
    with torch.no_grad():
        return torch.stack([_loss(model, row) for row in _sequences()])


def gradient(model: Yuan2ForCausalLM) -> Tensor:
    """Of the adapter, as one vector."""
    model.zero_grad(set_to_none=True)
    for row in _sequences():
        _loss(model, row).backward()
    found = [item.grad for name, item in model.named_parameters() if is_adapter(name)]
    return torch.cat([item.float().flatten() for item in found if item is not None])


def _loss(model: Yuan2ForCausalLM, row: Tensor) -> Tensor:
    return model(input_ids=row[None], labels=row[None], use_cache=False, return_logits=False).loss


def _sequences() -> Tensor:
    return torch.randint(3, 390, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("measure", [token_losses, gradient])
def test_it_computes_what_lora_beside_the_dequantised_weights_computes(
    models: Models, measure: Callable[[Yuan2ForCausalLM], Tensor]
) -> None:
    expected = measure(models.dequantised)
    bound = rounding_distance(lambda: measure(models.dequantised))
    assert float((measure(models.four_bits) - expected).norm()) < bound
    assert float((measure(models.plain) - expected).norm()) > 1.5 * bound, "plain LoRA would pass"


def test_each_weight_of_4_bits_is_as_near_as_nf4_allows(models: Models) -> None:
    """And none that has another block's scale would pass."""
    assert len(models.stand_for) == 2 * len(MATRICES)
    for name, found in models.stand_for.items():
        blocks, plain = (item.float().view(-1, BLOCK) for item in (found, models.base[name]))
        scale = plain.abs().amax(dim=1, keepdim=True)
        bound = scale * (LARGEST_STEP + SCALE_ERROR) + blocks.abs() * TO_BF16
        assert ((blocks - plain).abs() <= bound).all(), name
        assert not ((blocks.roll(1, dims=0) - plain).abs() <= bound).all(), name


def test_its_loss_is_that_of_full_precision_but_for_the_error_of_4_bits(
    models: Models, wide_inputs: tuple[Path, Path]
) -> None:
    """By the mean value theorem no farther away than the steepest gradient on the way, looked for at three
    places, times the way's length; rounding comes on top."""
    model = load_for_training(job_of(wide_inputs[0], **{**LORA, "precision": "fp32"}))
    put_adapter(model, models.adapter)
    weights = {published_name(name): item for name, item in model.named_parameters() if not is_adapter(name)}
    start = {name: item.detach().clone() for name, item in weights.items()}
    way = {name: {**models.base, **models.stand_for}[name].float() - item for name, item in start.items()}
    steepest = dict.fromkeys(way, 0.0)
    found = []
    for share in (0.0, 0.5, 1.0):
        for name, item in weights.items():
            item.requires_grad_(True).data.copy_(start[name] + share * way[name])
        model.zero_grad(set_to_none=True)
        loss = torch.stack([_loss(model, row) for row in _sequences()]).mean()
        loss.backward()
        found.append(loss.item())
        steepest = {name: max(steepest[name], float(item.grad.norm())) for name, item in weights.items()}
    explained = sum(steepest[name] * float(item.norm()) for name, item in way.items())
    rounding = rounding_distance(lambda: token_losses(models.dequantised))
    measured = float(token_losses(models.four_bits).mean())
    assert abs(measured - found[0]) < explained + rounding
    assert abs(measured - found[-1]) < rounding


def test_a_run_in_4_bits_learns(output: Path) -> None:
    found = losses(output)
    assert found[-1] < found[0] - 0.1


def test_weights_of_4_bits_are_bytes_and_the_rest_is_bf16(
    models: Models, wide_inputs: tuple[Path, Path]
) -> None:
    from bitsandbytes.nn import Params4bit

    asked = job_of(wide_inputs[0], **QLORA)
    model = load_for_training(asked)
    types = {name: item.dtype for name, item in model.named_parameters()}
    bytes_ = [name for name, dtype in types.items() if dtype == torch.uint8]
    assert {published_name(name).split(".")[-2] for name in bytes_} == set(MATRICES)
    assert len(bytes_) == 2 * len(MATRICES)
    assert set(types.values()) == {torch.uint8, torch.bfloat16}
    assert all(item.quant_state.nested for item in model.parameters() if isinstance(item, Params4bit))
    layer = model.model.layers[0].mlp.down_proj
    layer.base_layer.weight = torch.nn.Parameter(models.base["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(
        JobError, match=r"^method.qlora: \S+down_proj\S+ is bfloat16 instead of uint8; use method.lora"
    ):
        check_model(model, asked)


def test_a_model_whose_rows_hold_no_whole_blocks_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """bitsandbytes 0.50 gives such weights other blocks' scales on processors with AVX-512."""
    narrow = write_model(tmp_path / "narrow", layers=1, hidden=32)
    job = make_job(narrow, inputs[1], tmp_path / "output", stage=0, **QLORA)
    with pytest.raises(
        JobError,
        match=r"^method.qlora: the model's hidden_size is 32, and on CPUs \S+ needs a multiple of 64",
    ):
        check_job(job, Workspace(tmp_path), lambda: None)
