"""A checkpoint back into a model and its optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from yuan2_trainer.checkpoint.fragments import live_fragments, set_step
from yuan2_trainer.checkpoint.manifest import Found
from yuan2_trainer.checkpoint.shards import ShardReader
from yuan2_trainer.model.spreading import fill


def put_weights(model: nn.Module, found: Found) -> None:
    """Give a model the trained weights of a checkpoint: the optimizer's, rounded as an optimizer step rounds
    them."""
    reader = ShardReader(found)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    fill(model, (reader.full(name) for name in names), names)


def restore(engine: Any, found: Found) -> None:
    """Put the optimizer into the state of a checkpoint, exactly; the weights must have been loaded from it
    before."""
    reader = ShardReader(found)
    for fragment in live_fragments(engine):
        for kind, view in fragment.views.items():
            reader.fill(view, fragment.name, kind, fragment.start)
    manifest = found.manifest
    set_step(engine, manifest.step if manifest.optimizer_step is None else manifest.optimizer_step)


def start_optimizer(engine: Any) -> None:
    """Make the optimizer's state for a run from the beginning, so that later code finds it in every stage."""
    live_fragments(engine)
    set_step(engine, 0)
