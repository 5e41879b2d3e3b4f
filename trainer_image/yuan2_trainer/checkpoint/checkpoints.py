"""Saving and loading a run by all ranks together."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from yuan2_core.durable import sync
from yuan2_trainer.checkpoint.background import Background
from yuan2_trainer.checkpoint.fragments import Fragment, live_fragments, steps_taken
from yuan2_trainer.checkpoint.manifest import (
    MANIFEST,
    PARTIAL,
    Found,
    Manifest,
    ShardFile,
    checkpoint_name,
    complete_checkpoints,
    open_checkpoint,
    remove_checkpoint,
    remove_partials,
    surplus,
    verify_file,
)
from yuan2_trainer.checkpoint.shards import shard_name, write_shard
from yuan2_trainer.checkpoint.snapshot import HostCopy
from yuan2_trainer.data.order import Position
from yuan2_trainer.pod.outcome import Outcome, OutputFullError, outcome_of

Warn = Callable[[str], None]

_LONGEST_WRITE = timedelta(hours=1)
"""Ranks wait so long for the slowest one's file."""


class Checkpoints:
    """The checkpoints of one output directory, which all ranks share.

    Saving copies the optimizer's numbers to host memory and writes them beside the training, where memory
    allows; where it does not, training waits.
    """

    def __init__(self, root: Path, keep: int, warn: Warn, guard: Callable[[], object] = lambda: None) -> None:
        self.root = root
        self.keep = keep
        self.warn = warn
        self.guard = guard
        """Raises where another attempt holds the output; rank 0 asks before it moves or removes anything."""
        self._copy = HostCopy()
        self._background = Background()
        self._completed: int | None = None
        self._damaged: set[Path] = set()
        self._group: Any = None

    def save(self, engine: Any, position: Position, facts: dict[str, Any], overlap: bool = True) -> None:
        """Write a checkpoint when the one before it is complete.

        On return it is complete too, or only copied: `completed` and `finish` tell of it.

        Args:
            engine: DeepSpeed's engine, between two optimizer steps.
            position: where the run stands.
            facts: the remaining fields of the `Manifest`.
            overlap: write beside the training if memory allows.

        Raises:
            OutputFullError: the volume is full; nothing is left of the attempt and older checkpoints are
            untouched. OSError: another error while writing, on any rank. Both also those of the checkpoint
            before.
        """
        self.finish()
        if self._group is None:
            # Of its own: the training's collectives go on meanwhile, and gloo knows no GPU.
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        held = _own_share(engine)
        manifest = Manifest(
            step=position.step,
            epoch=position.epoch,
            offset=position.offset,
            optimizer_step=steps_taken(engine),
            world_size=dist.get_world_size(),
            shapes={name: list(_shape(item)) for name, item in _trainable(engine)},
            files={},
            **facts,
        )
        copied = self._copy.take(held) if overlap else None
        if copied is None:
            self._write(held, manifest)
        else:
            self._background.start(lambda: self._write(copied, manifest))

    def completed(self) -> int | None:
        """Step of the newest complete checkpoint of this attempt; raises as `save`."""
        self._background.check()
        return self._completed

    def finish(self) -> int | None:
        """Wait until what was saved is complete, synced and named, surplus ones gone; as `completed`."""
        self._background.wait()
        return self._completed

    def _write(self, held: list[Fragment], manifest: Manifest) -> None:
        final = self.root / checkpoint_name(manifest.step)
        partial = final.with_name(final.name + PARTIAL)
        self._together(lambda: self._guarded(_make_empty, partial), partial, only_rank_0=True)
        files = self._together(lambda: _write_own_shard(held, partial), partial)
        whole = manifest.model_copy(update={"files": dict(file for file in files if file is not None)})
        self._together(lambda: self._guarded(_complete, partial, final, whole), partial, only_rank_0=True)
        self._completed = manifest.step
        self._damaged.discard(final)
        if dist.get_rank() == 0:
            for directory in surplus(self.root, self.keep, self._damaged):
                remove_checkpoint(directory)

    def release(self) -> None:
        """Give back the host memory of copies, when nothing is saved any more."""
        self.finish()
        self._copy = HostCopy()

    def digest(self, step: int) -> str | None:
        """SHA-256 of the manifest of a step's checkpoint, which holds those of its weights; `None`: there is
        none."""
        try:
            manifest = (self.root / checkpoint_name(step) / MANIFEST).read_bytes()
        except OSError:
            return None
        return hashlib.sha256(manifest).hexdigest()

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        self.guard()
        act(*arguments)

    def latest(self) -> Found | None:
        """The newest checkpoint whose files all have their checksums; the ranks verify a share of the files
        each."""
        if dist.get_rank() == 0 and self.root.is_dir():
            self._guarded(remove_partials, self.root)
        dist.barrier()
        every = complete_checkpoints(self.root, self.warn if dist.get_rank() == 0 else _silent)
        return next((found for found in every if self._is_sound(found.directory, found)), None)

    def find(self, step: int) -> Found | None:
        """The checkpoint of a step, if it is complete for all ranks and its files have their checksums."""
        self.finish()
        directory = self.root / checkpoint_name(step)
        found = open_checkpoint(directory, _silent)
        return found if self._is_sound(directory, found) else None

    def _is_sound(self, directory: Path, found: Found | None) -> bool:
        own = "it is not complete" if found is None else self._verify_share(found)
        problems = [problem for problem in _gather(own) if problem]
        if problems:
            self._damaged.add(directory)
            if dist.get_rank() == 0:
                self.warn(f"checkpoint {directory.name} is skipped: {problems[0]}")
        return not problems

    def _verify_share(self, found: Found) -> str | None:
        mine = sorted(found.manifest.files)[dist.get_rank() :: dist.get_world_size()]
        for name in mine:
            problem = verify_file(found.directory, name, found.manifest.files[name])
            if problem is not None:
                return problem
        return None

    def _together(self, act: Callable[[], Any], partial: Path, only_rank_0: bool = False) -> list[Any]:
        """Act on the ranks and let all of them know of an error on any, so that none waits for one that
        failed."""
        result, failure = None, None
        if dist.get_rank() == 0 or not only_rank_0:
            try:
                result = act()
            except OSError as error:
                failure = error
        reports = _gather((result, None if failure is None else outcome_of(failure)), self._group)
        failed = [report[1] for report in reports if report[1] is not None]
        if failed:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise failure if failure and failed[0].reason != "OutputFull" else _error_of(failed[0], self.root)
        return [report[0] for report in reports]


def _own_share(engine: Any) -> list[Fragment]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = [fragment.share(rank, world_size) for fragment in live_fragments(engine)]
    return [fragment for fragment in shares if fragment.numel > 0]


def _write_own_shard(held: list[Fragment], partial: Path) -> tuple[str, ShardFile] | None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not partial.is_dir():
        raise OSError(
            f"output: rank {rank} does not see {partial}, which rank 0 made; "
            "all pods must mount one shared volume"
        )
    name = shard_name(rank, world_size)
    return name, write_shard(partial / name, held)


def _complete(partial: Path, final: Path, manifest: Manifest) -> None:
    (partial / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    sync(partial / MANIFEST)
    sync(partial)
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    sync(final.parent)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _error_of(outcome: Outcome, root: Path) -> Exception:
    if outcome.reason != "OutputFull":
        return OSError(outcome.message)
    usage = shutil.disk_usage(root)
    return OutputFullError(
        f"output: no space left for a checkpoint in {root} ({usage.free / 1e9:.2f} GB of "
        f"{usage.total / 1e9:.2f} GB free); free space, ask for a larger claim, or lower checkpoint.keep"
    )


def _trainable(engine: Any) -> list[tuple[str, Any]]:
    return [(name, item) for name, item in engine.module.named_parameters() if item.requires_grad]


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _gather(value: Any, group: Any = None) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _silent(_: str) -> None:
    """Only rank 0 warns: the ranks see the same files."""
