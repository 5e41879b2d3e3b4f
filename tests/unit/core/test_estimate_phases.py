"""One run of 102B in its phases, as `docs/large-models.md` walks it, and the laws of phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from yuan2_core.estimate import GPUS, Data, Run, Shape, estimate
from yuan2_core.estimate.duration import train_seconds
from yuan2_core.estimate.phases import Phase, Storage, phases, stored_parameters
from yuan2_core.presets import PRESETS

PAGE = Path(__file__).parents[3] / "docs/large-models.md"
RUN = Run(
    shape=Shape.of(PRESETS["102B"]),
    method="lora",
    stage=3,
    length=2048,
    micro_batch=1,
    accumulation=16,
    gpus_per_node=8,
    gpu=GPUS["A100-80"],
    data=Data(samples=52_000, mean_tokens=195, layout="packed", epochs=3),
)
SHARED = Storage("NFS, 25 Gb/s", read=2e9, write=1e9)
LOCAL = Storage("local NVMe", read=6e9, write=3e9)


def table(storage: Storage) -> str:
    """The phases as the page shows them."""
    lines = [
        f"| {storage.name} | GB a GPU | GB of the host | GB read | GB written | GB sent by a rank | time |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(phase) for phase in phases(RUN, storage, merge=True)])


def row(phase: Phase) -> str:
    sizes = (phase.gpu, phase.host, phase.read, phase.written, phase.sent)
    assert phase.seconds is not None
    seconds = f"{phase.seconds:.0f} s" if phase.seconds >= 1 else f"{phase.seconds:.1f} s"
    return f"| {phase.name} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} | {seconds} |"


@pytest.mark.parametrize("storage", [SHARED, LOCAL], ids=lambda storage: storage.name)
def test_the_page_shows_the_phases(storage: Storage) -> None:
    assert table(storage) in PAGE.read_text(encoding="utf-8"), table(storage)


def test_the_page_says_how_long_it_takes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert estimate(RUN).summary in text
    assert f"{RUN.steps:,} steps" in text


def test_steps_take_the_time_of_the_training() -> None:
    step = phases(RUN, SHARED)[1]
    assert RUN.steps is not None
    assert step.seconds is not None
    assert RUN.steps * step.seconds == pytest.approx(train_seconds(RUN))


def test_weights_are_read_once_however_many_ranks_there_are() -> None:
    more = replace(RUN, nodes=2)
    assert phases(more, SHARED)[0].read == phases(RUN, SHARED)[0].read
    assert phases(RUN, SHARED)[0].read == 2 * (stored_parameters(RUN) + RUN.shape.embedding)


def test_no_host_holds_the_model() -> None:
    for phase in phases(RUN, SHARED, merge=True):
        assert phase.host < 0.02 * 2 * RUN.shape.parameters
    offloaded = replace(RUN, offload="parameters")
    load = phases(offloaded, SHARED)[0]
    assert load.host == pytest.approx(2 * RUN.shape.parameters, rel=0.01)
    assert load.gpu < phases(RUN, SHARED)[0].gpu - 25e9


def test_without_a_merged_model_only_the_adapter_is_written() -> None:
    adapter, merged = (phases(RUN, SHARED, merge=merge)[3].written for merge in (False, True))
    assert adapter == 2 * RUN.trainable
    assert merged - adapter == 2 * stored_parameters(RUN)


def test_without_a_known_gpu_there_are_bytes_and_no_times_of_exchange() -> None:
    load, step, *_ = phases(replace(RUN, gpu=None), SHARED)
    assert (load.seconds, step.seconds) == (None, None)
    assert load.read > 0
