"""The estimate beside what others measured, and its laws."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_core.contract import Launch
from yuan2_core.estimate import (
    GPUS,
    OURS,
    PUBLISHED,
    Data,
    Estimate,
    Run,
    Shape,
    estimate,
    estimate_for_spec,
    find_gpu,
    fits,
)
from yuan2_core.estimate.duration import EFFICIENCY, micro_batch_flops, train_seconds
from yuan2_core.estimate.memory import BUCKET, LOSS_CHUNK, gpu_memory, host_memory
from yuan2_core.presets import PRESETS
from yuan2_core.sections import Full, Method, Training

ROOT = Path(__file__).parents[3]
MEASURED: dict[str, Any] = json.loads((ROOT / "tests/golden/recipe/measured.json").read_text())
STAGES = {"full": 2, "lora": 3, "qlora": 0}
SHAPES = {size: Shape.of(preset) for size, preset in PRESETS.items()}
MEMORY_TOLERANCE = 0.20
TIME_TOLERANCE = 0.35


@dataclass(frozen=True)
class Row:
    """A measured row beside its estimate."""

    label: str
    gigabytes: float
    hours: float
    found: Estimate

    @property
    def memory_error(self) -> float:
        return self.found.memory_bytes_per_gpu / 1e9 / self.gigabytes - 1

    @property
    def time_error(self) -> float:
        assert self.found.hours is not None
        return self.found.hours / self.hours - 1


def published_run(row: dict[str, Any]) -> Run:
    """A row of the published tables as they ran it."""
    data = MEASURED["data"][row["table"]]
    return Run(
        shape=SHAPES[row["size"]],
        method=row["method"],
        stage=STAGES[row["method"]],  # type: ignore[arg-type]
        length=row["length"],
        micro_batch=row["microBatch"],
        accumulation=row["globalBatch"] // (row["microBatch"] * row["gpus"]),
        gpus_per_node=row["gpus"],
        gpu=GPUS[row["gpu"]],
        data=Data(data["samples"], data["meanTokens"], row["table"], data["epochs"]),
        software=PUBLISHED,
    )


def measured(row: dict[str, Any]) -> Row:
    label = (
        f"{row['table']} | {row['method']} | {row['size']} | {row['length']} | {row['gpus']} × {row['gpu']}"
    )
    return Row(label, row["gigabytes"], row["hours"], estimate(published_run(row)))


ROWS = [measured(row) for row in MEASURED["rows"]]


def table() -> str:
    """Measured against estimated, as `docs/estimate.md` shows it."""
    head = "| rows | method | model | length | GPUs | GB | estimate | | hours | estimate | |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in ROWS:
        memory = f"{row.gigabytes:g} | {row.found.memory_bytes_per_gpu / 1e9:.1f} | {row.memory_error:+.0%}"
        time = f"{row.hours:g} | {row.found.hours:.2f} | {row.time_error:+.0%}"
        lines.append(f"| {row.label} | {memory} | {time} |")
    return "\n".join(lines)


def run(**changed: Any) -> Run:
    """2B in full on eight L20, unless told otherwise."""
    base = Run(SHAPES["2B"], "full", 2, 1024, 4, 4, 8, gpu=GPUS["L20"])
    return replace(base, **changed)


def test_the_table_is_printed_and_stands_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{table()}")
    assert table() in (ROOT / "docs/estimate.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_memory_of_every_published_row_is_within_a_fifth(row: Row) -> None:
    assert abs(row.memory_error) <= MEMORY_TOLERANCE


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_time_of_every_published_row_is_within_35_percent(row: Row) -> None:
    assert abs(row.time_error) <= TIME_TOLERANCE


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_what_was_run_is_said_to_fit(row: Row) -> None:
    assert row.found.fits
    assert row.found.advice == ""


def test_there_is_one_efficiency_a_method() -> None:
    assert set(EFFICIENCY) == {"full", "lora", "qlora"}
    assert all(0 < value <= 1 for value in EFFICIENCY.values())


@pytest.mark.parametrize("size", PRESETS)
def test_the_shape_counts_all_parameters_but_vectors(size: str) -> None:
    assert SHAPES[size].parameters == pytest.approx(PRESETS[size].parameters, rel=1e-3)


def test_the_parts_of_memory_add_up() -> None:
    memory = gpu_memory(run(stage=3))
    assert memory.total == pytest.approx(memory.needed + memory.reserve)
    assert memory.weights == pytest.approx(2 * SHAPES["2B"].parameters / 8)
    assert memory.optimizer == pytest.approx(12 * SHAPES["2B"].parameters / 8)
    assert memory.gradients == pytest.approx(2 * SHAPES["2B"].parameters / 8)


def test_arithmetic_of_a_full_step_with_checkpointing_is_eight_flop_a_weight_and_token() -> None:
    job = run(length=8, micro_batch=1)
    assert micro_batch_flops(job) == pytest.approx(8 * SHAPES["2B"].parameters * 8, rel=1e-3)


def test_the_reserve_stays_within_the_gpu() -> None:
    job = run(shape=SHAPES["102B"], method="lora", stage=3, micro_batch=2)
    assert gpu_memory(job).total <= GPUS["L20"].memory_bytes
    assert gpu_memory(replace(job, gpu=None)).total > GPUS["L20"].memory_bytes


def test_a_chunked_loss_saves_the_logits_of_long_micro_batches() -> None:
    job = run(micro_batch=8, length=2048)
    assert gpu_memory(replace(job, software=PUBLISHED)).working > 3 * gpu_memory(job).working


@pytest.mark.torch
def test_the_constants_are_those_of_our_own_code() -> None:
    from yuan2_model import loss
    from yuan2_trainer.model.deepspeed import ZERO_2, ZERO_3

    assert loss._CHUNK_LOGITS == LOSS_CHUNK
    assert ZERO_2["reduce_bucket_size"] == ZERO_3["reduce_bucket_size"] == BUCKET
    assert (ZERO_2["overlap_comm"], ZERO_3["overlap_comm"]) == (False, True)


@pytest.mark.parametrize(("size", "layers"), [("2B", 1e9 / 75.5e6), ("51B", 2.5), ("102B", 2.5)])
def test_zero_3_keeps_what_two_layers_gather(size: str, layers: float) -> None:
    """A layer that is computed again and gone back through uses its weights twice."""
    job = run(shape=SHAPES[size], stage=3)
    assert job.zero_3.live == pytest.approx(layers * SHAPES[size].layer, rel=1e-3)
    more = gpu_memory(job).gathered - gpu_memory(replace(job, software=PUBLISHED)).gathered
    assert more == pytest.approx(2 * (job.zero_3.live - 1e9))


def test_small_matrices_of_an_adapter_are_never_cut() -> None:
    """All of rank 8 at 51B; of rank 64 none."""
    small = run(shape=SHAPES["51B"], method="lora", stage=3, lora_targets=("q_proj", "down_proj"))
    assert small.persistent_adapter == small.trainable
    large = replace(small, lora_rank=64)
    assert large.persistent_adapter == 0
    cut = gpu_memory(large).weights - gpu_memory(small).weights
    assert cut == pytest.approx(2 * (large.trainable / 8 - small.trainable))


@pytest.mark.parametrize("stage", [2, 3])
def test_fp32_gradients_take_twice_the_bytes(stage: int) -> None:
    job = run(stage=stage)
    plain, wide = gpu_memory(job), gpu_memory(replace(job, gradient_bytes=4))
    assert wide.gradients == 2 * plain.gradients
    assert wide.buckets - plain.buckets == pytest.approx(2 * BUCKET)


@pytest.mark.torch
def test_a_layer_of_ours_saves_what_the_estimate_counts() -> None:
    """Saved tensors of one layer in bf16, in hidden states a token; the rest of the count is backward's."""
    saved = _saved_hidden_states(hidden=256, tokens=128)
    assert 0.65 * OURS.layer_vectors <= saved <= OURS.layer_vectors


def _saved_hidden_states(hidden: int, tokens: int) -> float:
    import torch

    from yuan2_model import Yuan2Config
    from yuan2_model.layers import DecoderLayer, rotation
    from yuan2_model.layout import lay_out

    config = Yuan2Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=4,
        num_hidden_layers=1,
        eod_token=1,
        sep_token=2,
    )
    layer = DecoderLayer(config, 0).to(torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    layout = lay_out(x, None, None, None, None)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, layout, rotation(layout.positions_BT, hidden // 4, torch.bfloat16), None)
    own = [kept[key].untyped_storage().nbytes() for key in kept if key not in weights]
    return sum(own) / (tokens * hidden * 2)


ADVICE = [
    pytest.param(
        run(length=8192, micro_batch=32, accumulation=1),
        "training.microBatchSize to 16 and training.gradientAccumulationSteps to 2 ",
        id="a smaller micro batch comes first and keeps the global batch",
    ),
    pytest.param(run(stage=0, gpu=GPUS["RTX 4090"]), "deepspeed.stage to 2 ", id="then a higher stage"),
    pytest.param(
        run(shape=SHAPES["51B"], stage=3, gpu=GPUS["A100-80"]),
        "deepspeed.offload to optimizer ",
        id="then offloading",
    ),
    pytest.param(
        run(shape=SHAPES["102B"], stage=3, micro_batch=1, gpus_per_node=1, gpu=GPUS["A100-80"]),
        "method to qlora ",
        id="then 4-bit weights, where it is the model that is too large",
    ),
    pytest.param(
        run(shape=SHAPES["102B"], stage=3, micro_batch=1, accumulation=16, gpu=GPUS["RTX 4090"]),
        "training.gradientAccumulationSteps to 1 and workers.replicas to 64 ",
        id="then more pods, where one node has not the memory to offload into",
    ),
    pytest.param(
        run(shape=SHAPES["102B"], method="qlora", stage=0, gpus_per_node=1),
        "no setting makes it fit",
        id="nothing helps",
    ),
]


@pytest.mark.parametrize(("job", "words"), ADVICE)
def test_advice_names_the_first_change_that_fits(job: Run, words: str) -> None:
    found = estimate(job)
    assert found.fits is False
    assert words in found.advice
    assert "\n" not in found.advice


def test_without_a_gpu_there_is_memory_but_no_verdict() -> None:
    found = estimate(run(gpu=None, max_steps=10))
    assert (found.fits, found.hours, found.advice) == (None, None, "")
    assert found.memory_bytes_per_gpu > 0


def test_steps_alone_give_hours() -> None:
    one, ten = (train_seconds(run(max_steps=steps)) for steps in (1, 10))
    assert one is not None
    assert ten == pytest.approx(10 * one)


def seconds(**changed: Any) -> float:
    found = train_seconds(run(**changed))
    assert found is not None
    return found


def test_packing_saves_the_time_of_the_padding() -> None:
    alone = {"gpus_per_node": 1, "stage": 0}
    padded, packed = (seconds(data=Data(52_000, 195, layout), **alone) for layout in ("padded", "packed"))
    assert padded / packed == pytest.approx(1024 / 195, rel=0.05)


def test_packing_leaves_the_steps_and_saves_their_exchanges() -> None:
    padded, packed = (run(data=Data(52_000, 195, layout)) for layout in ("padded", "packed"))
    assert padded.steps == packed.steps == 407
    assert packed.rows_per_step == pytest.approx(16 * 195 / 1024 / 0.98)
    assert 4 < seconds(data=padded.data) / seconds(data=packed.data) < 1024 / 195


def test_without_the_data_the_hours_of_given_steps_are_those_of_full_rows() -> None:
    bound = estimate(run(max_steps=407))
    found = estimate(run(max_steps=407, data=Data(52_000, 195)))
    assert bound.hours is not None
    assert found.hours is not None
    assert (bound.at_most, found.at_most) == (True, False)
    assert bound.hours > 4 * found.hours
    assert bound.summary.endswith(f"at most {bound.hours * 60:.0f} min")


def test_offloading_names_the_memory_of_the_host() -> None:
    found = estimate(run(offload="optimizer"))
    words = f"GB per GPU and {found.host_bytes_per_gpu / 1e9:.1f} GB of the host's memory for each"
    assert words in found.summary


def test_checkpointing_every_other_layer_lies_between_all_and_none() -> None:
    every, second, none = (
        run(checkpointing=again, checkpointing_every=of) for again, of in ((True, 1), (True, 2), (False, 1))
    )
    memory = [gpu_memory(job).activations for job in (every, second, none)]
    flops = [micro_batch_flops(job) for job in (every, second, none)]
    assert memory[1] == pytest.approx((memory[0] + memory[2]) / 2)
    assert flops[1] == pytest.approx((flops[0] + flops[2]) / 2)
    tight = replace(second, micro_batch=1, length=24576)
    assert "training.gradientCheckpointingEvery to 1 " in estimate(tight).advice


def test_a_run_of_conflicting_fields_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ZeRO-3 cannot cut 4-bit weights"):
        run(method="qlora", stage=3)
    with pytest.raises(ValueError, match=r"deepspeed\.offload: parameters wait"):
        run(offload="parameters")
    with pytest.raises(ValueError, match=r"deepspeed\.offload: without ZeRO"):
        run(stage=0, offload="optimizer")
    with pytest.raises(ValueError, match=r"training\.microBatchSize: must be at least 1, found 0"):
        run(micro_batch=0)


JOBS = st.builds(
    run,
    shape=st.sampled_from(list(SHAPES.values())),
    method=st.sampled_from(["full", "lora"]),
    stage=st.sampled_from([2, 3]),
    length=st.sampled_from([512, 2048]),
    micro_batch=st.integers(1, 8),
    nodes=st.integers(1, 4),
    checkpointing=st.booleans(),
    gpu=st.sampled_from(list(GPUS.values())),
)


@given(JOBS)
def test_more_tokens_never_need_less_memory(job: Run) -> None:
    assert gpu_memory(replace(job, length=2 * job.length)).needed >= gpu_memory(job).needed


@given(JOBS)
def test_checkpointing_and_more_pods_never_need_more_memory(job: Run) -> None:
    assert gpu_memory(replace(job, checkpointing=True)).needed <= gpu_memory(job).needed
    assert gpu_memory(replace(job, nodes=job.nodes + 1)).needed <= gpu_memory(job).needed


@given(JOBS)
def test_offloading_moves_memory_to_the_host(job: Run) -> None:
    moved = replace(job, offload="optimizer")
    assert gpu_memory(moved).needed < gpu_memory(job).needed
    assert host_memory(moved) > host_memory(job) == 0


@given(JOBS)
def test_advice_stands_exactly_where_a_run_does_not_fit(job: Run) -> None:
    assert bool(estimate(job).advice) == (fits(job) is False)


PRODUCTS = {
    "L20": "L20",
    "NVIDIA-L40S": "L40S",
    "NVIDIA-A100-SXM4-80GB": "A100-80",
    "NVIDIA-A100-80GB-PCIe": "A100-80 PCIe",
    "NVIDIA-A100-SXM4-40GB": "A100-40",
    "NVIDIA-A800-SXM4-80GB": "A800",
    "NVIDIA-H100-80GB-HBM3": "H100",
    "NVIDIA-H100-PCIe": "H100 PCIe",
    "NVIDIA-H200": "H200",
    "NVIDIA-H800": "H800",
    "NVIDIA-GeForce-RTX-4090": "RTX 4090",
}


@pytest.mark.parametrize(("product", "name"), PRODUCTS.items())
def test_gpus_are_found_by_their_node_label(product: str, name: str) -> None:
    assert find_gpu(product) == GPUS[name]


@pytest.mark.parametrize("product", ["", "Tesla-V100-SXM2-32GB", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"])
def test_what_is_no_whole_known_gpu_is_not_found(product: str) -> None:
    assert find_gpu(product) is None


LAUNCH = Launch(nodes=1, processes_per_node=8, device="cuda")


def test_a_spec_is_estimated_from_its_resolved_fields() -> None:
    found = estimate_for_spec(
        size="2B",
        method=Method(full=Full()),
        training=Training(max_steps=100),
        stage=2,
        launch=LAUNCH,
        gpu=GPUS["L20"],
    )
    assert found == estimate(run(max_steps=100))
    assert found is not None
    assert found.hours is not None
    words = f"about {found.memory.total / 1e9:.0f} GB per GPU, at most {found.hours * 60:.0f} min"
    assert found.summary == words


def test_an_adapter_of_a_spec_is_read() -> None:
    adapter = SimpleNamespace(r=64, target_modules=["q_proj", "down_proj"])
    found = estimate_for_spec(
        size="51B",
        method=SimpleNamespace(full=None, lora=adapter, qlora=None),
        training=Training(),
        stage=3,
        launch=LAUNCH,
    )
    expected = run(
        shape=SHAPES["51B"],
        method="lora",
        stage=3,
        lora_rank=64,
        lora_targets=("q_proj", "down_proj"),
        gpu=None,
    )
    assert found == estimate(expected)
    assert expected.trainable == 42 * 64 * (2 * 8192 + 8192 + 32768)


def test_models_of_unknown_size_and_cpus_have_no_estimate() -> None:
    common = {"method": Method(full=Full()), "training": Training(), "stage": 2}
    assert estimate_for_spec(size="custom", launch=LAUNCH, **common) is None  # type: ignore[arg-type]
    cpu = LAUNCH.model_copy(update={"device": "cpu"})
    assert estimate_for_spec(size="2B", launch=cpu, **common) is None  # type: ignore[arg-type]
    known = estimate_for_spec(size="custom", launch=LAUNCH, dimensions=PRESETS["2B"], **common)  # type: ignore[arg-type]
    assert known == estimate(run(gpu=None))
