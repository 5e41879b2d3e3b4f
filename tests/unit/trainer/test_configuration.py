"""DeepSpeed's configuration, torchrun's options, processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import make_job
from yuan2_core.contract import Launch, TrainJob
from yuan2_core.estimate import Shape
from yuan2_core.presets import PRESETS
from yuan2_core.processors import available_cpus, threads_per_process
from yuan2_core.sections import Training
from yuan2_core.zero_limits import zero_3_limits
from yuan2_trainer.model.deepspeed import engine_config, parameter_groups, zero_section
from yuan2_trainer.pod.launcher import node_rank, torchrun_options
from yuan2_trainer.pod.outcome import JobError

POD = {
    "MASTER_ADDR": "tiny-1-0.tiny",
    "MASTER_PORT": "23456",
    "PET_MASTER_ADDR": "tiny-1-0.tiny",
    "PET_MASTER_PORT": "23456",
    "WORLD_SIZE": "4",
    "RANK": "1",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "2",
    "PET_NNODES": "2",
}
"""The environment of a PyTorchJob's second pod."""


def job(**training: object) -> TrainJob:
    return make_job(Path("/m"), Path("/d"), Path("/o"), **training)


def published(stage: int, **training: object) -> TrainJob:
    """A job with the recipe's own hyperparameters."""
    return job(stage=stage).model_copy(update={"training": Training(**training)})  # type: ignore[arg-type]


def on_gpu(stage: int = 2) -> TrainJob:
    return published(stage).model_copy(
        update={"launch": Launch(nodes=1, processes_per_node=8, device="cuda")}
    )


def test_zero_2_is_the_published_recipes() -> None:
    config = engine_config(on_gpu(), own_bf16_wrapper=False)
    assert config["zero_optimization"] == {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    assert config["bf16"] == {"enabled": True}
    assert config["zero_allow_untested_optimizer"] is True
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 4)
    assert config["gradient_clipping"] == 1.0
    assert "data_types" not in config


def test_buckets_are_small_on_a_cpu() -> None:
    for stage in (2, 3):
        section = engine_config(published(stage), own_bf16_wrapper=False)["zero_optimization"]
        assert section["stage"] == stage
        assert section["reduce_bucket_size"] == 5e7


@pytest.mark.parametrize(("size", "live"), [("2B", 1e9), ("51B", 2.5 * 1.208e9), ("102B", 2.5 * 1.208e9)])
def test_zero_3_has_the_limits_of_its_model(size: str, live: float) -> None:
    job = on_gpu(3)
    sized = job.model_copy(update={"model": job.model.model_copy(update={"size": size})})
    section = engine_config(sized)["zero_optimization"]
    assert section["stage3_max_live_parameters"] == pytest.approx(live, rel=1e-3)
    assert section["stage3_max_reuse_distance"] == section["stage3_max_live_parameters"]
    limits = zero_3_limits(PRESETS[size].hidden_size, Shape.of(PRESETS[size]).layer)
    assert section["stage3_param_persistence_threshold"] == limits.persistent
    assert section["stage3_prefetch_bucket_size"] == limits.prefetch


def test_zero_3_of_a_custom_model_has_the_limits_of_its_shape() -> None:
    shape = Shape(hidden=8192, layers=2, intermediate=32768, vocabulary=100)
    section = zero_section(3, "cuda", shape=shape)
    assert section["stage3_max_live_parameters"] == zero_3_limits(8192, shape.layer).live > 3e9


def test_fp32_accumulation_is_asked_for_only_where_deepspeed_wants_it() -> None:
    assert engine_config(published(0), True)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in engine_config(published(0, precision="fp32"), True)
    assert "data_types" not in engine_config(published(2), True)


@pytest.mark.parametrize("stage", [2, 3])
def test_fp32_gradients_are_sent_and_summed_in_fp32(stage: int) -> None:
    config = engine_config(published(stage, fp32_gradients=True))
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    in_fp32 = engine_config(published(stage, fp32_gradients=True, precision="fp32"))
    assert "data_types" not in in_fp32


def test_norms_and_biases_do_not_decay() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Conv2d(1, 1, (2, 1)))
    model[2].bias.requires_grad = False
    decayed, plain = parameter_groups(model.named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [tuple(item.shape) for item in decayed["params"]] == [(3, 2), (1, 1, 2, 1)]
    assert plain["weight_decay"] == 0.0
    assert [tuple(item.shape) for item in plain["params"]] == [(3,), (3,), (3,)]
    assert len(parameter_groups([("w", torch.nn.Parameter(torch.zeros(2, 2)))], 0.1)) == 1


def launch(nodes: int, processes: int) -> Launch:
    return Launch(nodes=nodes, processes_per_node=processes, device="cpu")


def test_torchrun_gets_what_a_pytorchjob_pod_has() -> None:
    assert torchrun_options(launch(2, 2), POD) == [
        "--nnodes=2",
        "--nproc-per-node=2",
        "--node-rank=1",
        "--master-addr=tiny-1-0.tiny",
        "--master-port=23456",
        "--rdzv-conf=timeout=900",
    ]
    assert node_rank(POD) == 1


def test_one_node_needs_no_environment() -> None:
    options = torchrun_options(launch(1, 2), {})
    assert options[:3] == ["--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    assert node_rank({}) == 0


@pytest.mark.parametrize(
    ("nodes", "processes", "environment", "text"),
    [
        (3, 2, POD, "PET_NNODES is 2, the job says 3"),
        (2, 1, POD, "PET_NPROC_PER_NODE is 2, the job says 1"),
        (2, 1, {}, "MASTER_ADDR is not set"),
    ],
)
def test_an_environment_of_another_job_is_refused(
    nodes: int, processes: int, environment: dict[str, str], text: str
) -> None:
    with pytest.raises(JobError, match=text):
        torchrun_options(launch(nodes, processes), environment)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "max 100000"}, None),
        ({}, None),
    ],
)
def test_the_cgroups_quota_limits_the_processors(
    tmp_path: Path, files: dict[str, str], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == (16 if most is None else most)


@pytest.mark.parametrize(("cpus", "processes", "threads"), [(16, 8, 2), (2, 2, 1), (1, 4, 1), (7, 2, 3)])
def test_processes_share_the_processors(cpus: int, processes: int, threads: int) -> None:
    assert threads_per_process(cpus, processes) == threads
