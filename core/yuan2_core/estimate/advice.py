"""What to change in a run that does not fit: the first of a list of changes that makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from yuan2_core.estimate.memory import gpu_memory, host_memory
from yuan2_core.estimate.run import Run, Stage

Change = Callable[[Run], Iterator[Run]]
"""The same run with one thing changed, ever more strongly; nothing where the change makes no sense."""

MOST_NODES: Final = 64
"""More pods than this are not suggested."""
HOST_MEMORY: Final = 1e12
"""Bytes of a node's memory that a suggested offload may take: an assumption, a spec does not say."""


def fits(run: Run) -> bool | None:
    """Whether a run's GPUs have the memory that it needs; None when they are not known."""
    return None if run.gpu is None else gpu_memory(run).needed <= run.gpu.memory_bytes


def advise(run: Run) -> str:
    """One sentence that says what to change so that a run fits; empty when it fits or nobody can tell."""
    if run.gpu is None or fits(run):
        return ""
    needed, present = spoken_gb(gpu_memory(run).needed), spoken_gb(run.gpu.memory_bytes)
    cause = f"about {needed} per GPU, but an {run.gpu.name} has {present}"
    better = next((found for found in _candidates(run) if _workable(found)), None)
    if better is None:
        return f"{cause}: no setting makes it fit; use GPUs with more memory or shorten training.maxLength"
    better = _without_needless(run, better)
    return f"{cause}: set {_joined(changes(run, better))} (about {_need(better)})"


def changes(before: Run, after: Run) -> list[str]:
    """The fields of a Yuan2FineTune that turn one run into another, with their new values."""
    method = [f"method to {after.method}"] if after.method != before.method else []
    values = (
        ("training.microBatchSize", before.micro_batch, after.micro_batch),
        ("training.gradientAccumulationSteps", before.accumulation, after.accumulation),
        ("training.gradientCheckpointing", before.checkpointing, after.checkpointing),
        ("training.gradientCheckpointingEvery", before.checkpointing_every, after.checkpointing_every),
        ("deepspeed.stage", before.stage, after.stage),
        ("deepspeed.offload", before.offload, after.offload),
        ("workers.replicas", before.nodes, after.nodes),
    )
    return method + [f"{name} to {str(new).lower()}" for name, old, new in values if old != new]


def _candidates(run: Run) -> Iterator[Run]:
    """Settings that leave alone what is learned, one by one and then together; then method and pods."""
    for options, together in ((_SETTINGS, _SETTINGS), (_METHOD_AND_PODS, _SETTINGS + _METHOD_AND_PODS)):
        for change in options:
            yield from change(run)
        yield from _together(run, together)


def _together(run: Run, options: tuple[Change, ...]) -> Iterator[Run]:
    """Each change made on top of the strongest form of those before it."""
    for change in options:
        last = run
        for last in change(run):
            yield last
        run = last


def _workable(run: Run) -> bool:
    return bool(fits(run)) and host_memory(run) * run.gpus_per_node <= HOST_MEMORY


def _without_needless(before: Run, after: Run) -> Run:
    """Take back the early changes of a combination where the later ones make it fit alone."""
    if after.nodes == before.nodes:
        kept = replace(after, micro_batch=before.micro_batch, accumulation=before.accumulation)
        after = kept if _workable(kept) else after
    kept = replace(after, checkpointing=before.checkpointing, checkpointing_every=before.checkpointing_every)
    return kept if _workable(kept) else after


def _smaller_micro_batch(run: Run) -> Iterator[Run]:
    """The global batch stays."""
    while run.micro_batch > 1:
        factor = 2 if run.micro_batch % 2 == 0 else run.micro_batch
        run = replace(run, micro_batch=run.micro_batch // factor, accumulation=run.accumulation * factor)
        yield run


def _checkpointing(run: Run) -> Iterator[Run]:
    if run.recomputed < 1:
        yield replace(run, checkpointing=True, checkpointing_every=1)


def _higher_stage(run: Run) -> Iterator[Run]:
    higher: dict[Stage, tuple[Stage, ...]] = {0: (2, 3), 2: (3,), 3: ()}
    for stage in higher[run.stage]:
        if not (stage == 3 and run.method == "qlora"):
            yield replace(run, stage=stage)


def _offload(run: Run) -> Iterator[Run]:
    if run.stage == 0:
        return
    if run.offload == "none":
        yield replace(run, offload="optimizer")
    if run.stage == 3 and run.offload != "parameters":
        yield replace(run, offload="parameters")


def _fewer_trained(run: Run) -> Iterator[Run]:
    if run.method == "full":
        yield replace(run, method="lora")
    if run.method != "qlora":
        yield replace(run, method="qlora", stage=2 if run.world > 1 else 0, offload="none")


def _more_nodes(run: Run) -> Iterator[Run]:
    """The global batch stays as long as accumulation can make room for it."""
    while run.stage >= 2 and run.nodes * 2 <= MOST_NODES:
        kept = run.accumulation // 2 if run.accumulation % 2 == 0 else run.accumulation
        run = replace(run, nodes=run.nodes * 2, accumulation=kept)
        yield run


_SETTINGS: Final[tuple[Change, ...]] = (_smaller_micro_batch, _checkpointing, _higher_stage, _offload)
_METHOD_AND_PODS: Final[tuple[Change, ...]] = (_fewer_trained, _more_nodes)


def spoken_gb(size: float) -> str:
    """`3.9 GB`, `44 GB`."""
    return f"{size / 1e9:.{0 if size >= 9.95e9 else 1}f} GB"


def _need(run: Run) -> str:
    gpu, host = spoken_gb(gpu_memory(run).needed), host_memory(run)
    return f"{gpu}, and {spoken_gb(host)} of the host's memory for each" if host else gpu


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
