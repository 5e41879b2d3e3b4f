"""What a method trains, what is refused, and how an adapter is put beside a model and merged into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import make_job
from yuan2_core.contract import Launch, TrainJob
from yuan2_core.sections import DeepSpeed, LoRA, Training
from yuan2_model.dimensions import Dimensions
from yuan2_trainer.checkpoint.export import export_directories
from yuan2_trainer.model.deepspeed import engine_config, merged
from yuan2_trainer.model.methods import check_method, missing_package, trainable_parameters
from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.reporting.run_record import completed_step
from yuan2_trainer.train.schedule import warmup_of

QLORA = {"qlora": {}}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def job(**changes: Any) -> TrainJob:
    return make_job(Path("/m"), Path("/d"), Path("/o"), **changes)


def tiny_model() -> Any:
    from yuan2_model import Yuan2Config, random_model

    config = Yuan2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eod_token=1,
        sep_token=2,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
    )
    return random_model(config, seed=0)


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(JobError, match=r"method.qlora: ZeRO-3 cannot cut 4-bit weights"):
        check_method(job(method=QLORA, precision="bf16", stage=3))


def test_qlora_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(JobError, match=r"method.qlora needs bitsandbytes 0.46 or newer, which this image"):
        check_method(job(method=QLORA, precision="bf16"))
    monkeypatch.setattr(metadata, "version", lambda _: "0.42.0")
    assert missing_package("bitsandbytes", (0, 43)) == "bitsandbytes 0.43 or newer, this image has 0.42.0"
    monkeypatch.setattr(metadata, "version", lambda _: "1.2.3")
    check_method(job(method=QLORA, precision="bf16"))


def test_overrides_are_merged_deep() -> None:
    over = {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5}
    wanted = job(stage=2, deepspeed={"overrides": over})
    config = engine_config(wanted, own_bf16_wrapper=False)
    assert config["steps_per_print"] == 5
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {}}) == {
        "a": {"b": 4, "c": 2},
        "d": {},
    }


def test_offload_and_profiler_stand_in_the_configuration() -> None:
    gpus = Launch(nodes=1, processes_per_node=8, device="cuda")
    wanted = job(stage=3).model_copy(
        update={"launch": gpus, "deepspeed": DeepSpeed(offload="parameters", flops_profiler=True)}
    )
    config = engine_config(wanted, own_bf16_wrapper=False)
    place = {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["offload_optimizer"] == place
    assert config["zero_optimization"]["offload_param"] == place
    assert config["flops_profiler"] == {
        "enabled": True,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
    }


def test_a_warm_up_has_one_length() -> None:
    assert warmup_of(Training(), 1000) == 30
    assert warmup_of(Training(warmup_ratio=0.1), 1000) == 100
    assert warmup_of(Training(warmup_steps=7), 1000) == 7
    assert warmup_of(Training(warmup_steps=0), 1000) == 0


def test_fp16_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"fp16 cannot train Yuan 2.0: its weights are bf16"):
        Training(precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("dora", [False, True])
def test_the_count_of_trainable_numbers_is_that_of_peft(dora: bool) -> None:
    from yuan2_trainer.model.adapters import add_adapter

    model = tiny_model()
    adapter = LoRA(r=4, target_modules=ALL, dora=dora)  # type: ignore[arg-type]
    dimensions: Dimensions = model.config.dimensions()
    add_adapter(model, adapter, "/m")
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    method = job(method={"lora": adapter.model_dump()}).method
    assert trainable_parameters(method, dimensions) == trained
    assert trainable_parameters(job().method, dimensions) == dimensions.parameters


@pytest.mark.parametrize("names", [["all-linear"], ["q_proj", "all-linear"]])
def test_all_linear_means_every_linear_layer_of_the_model(names: list[str]) -> None:
    from torch import nn

    found = LoRA.model_validate({"target_modules": names}).target_modules
    model = tiny_model()
    linear = {name.rsplit(".", 1)[-1] for name, item in model.named_modules() if isinstance(item, nn.Linear)}
    assert set(found) == linear - {"lm_head"}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", [{}, {"rs_lora": True}, {"dora": True}])
def test_a_saved_adapter_loads_with_peft_and_equals_the_merged_weights(
    tmp_path: Path, kind: dict[str, bool]
) -> None:
    import torch
    from peft import PeftModel

    from yuan2_model import save_model
    from yuan2_model.adapters import with_adapter
    from yuan2_model.dimensions import tensor_shapes
    from yuan2_trainer.model.adapters import add_adapter, save_adapter
    from yuan2_trainer.model.published import PublishedWeights

    model, adapter = tiny_model(), LoRA(target_modules=ALL, **kind)  # type: ignore[arg-type]
    add_adapter(model, adapter, "/base")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    state = {name: item.detach().clone() for name, item in model.named_parameters()}
    save_adapter(state, adapter, "/base", tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == "/base"
    served = with_adapter(tiny_model(), tmp_path).eval()
    published = PublishedWeights(model, adapter)
    weights = {name: published.read(name) for name in tensor_shapes(model.config.dimensions())}
    save_model(weights, model.config, tmp_path / "merged")
    whole = type(model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        plain = tiny_model()(input_ids=ids).logits
        assert not torch.allclose(plain, expected, atol=1e-2)
        for other in (loaded, served, whole):
            torch.testing.assert_close(other(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_counts_as_complete_depends_on_the_method(tmp_path: Path) -> None:
    lora = {"method": {"lora": {}}}
    assert export_directories(job()) == ["model"]
    assert export_directories(job(**lora)) == ["adapter"]
    assert export_directories(job(**lora, merge_adapter=True)) == ["adapter", "model"]
    wanted = make_job(Path("/m"), Path("/d"), tmp_path, **lora)
    (tmp_path / "job.json").write_text('{"complete": true, "identity": {}, "step": 4}')
    assert completed_step(wanted, _any) is None
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert completed_step(wanted, _any) == 4
    assert completed_step(wanted, bool) is None
    assert completed_step(wanted.model_copy(update={"merge_adapter": True}), _any) is None


def _any(_: object) -> bool:
    return True


def test_a_directory_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    from yuan2_model import ModelFilesError
    from yuan2_model.adapters import with_adapter

    with pytest.raises(ModelFilesError, match=r"adapter_config.json is missing"):
        with_adapter(tiny_model(), tmp_path)


def test_layers_are_computed_again_every_nth(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[object] = []
    inner = model.model._gradient_checkpointing_func

    def counted(function: Any, *arguments: Any) -> Any:
        calls.append(function)
        return inner(function, *arguments)

    monkeypatch.setattr(model.model, "_gradient_checkpointing_func", counted)
    ids = torch.arange(8).view(1, 8)
    for every, expected in ((1, 2), (2, 1)):
        calls.clear()
        model.model.checkpoint_every = every
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert len(calls) == expected


def test_the_config_beside_an_adapter_names_no_code_that_is_not_there(tmp_path: Path) -> None:
    from yuan2_trainer.model.adapters import save_base_config

    plain = {"model_type": "yuan", "hidden_size": 32, "note": "源"}
    code = {"AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(plain | {"auto_map": code}), encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    save_base_config(tmp_path, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "config.json").read_text("utf-8")) == plain
