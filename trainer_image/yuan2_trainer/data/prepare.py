"""Reads, checks and renders the whole data set before any device is used, once for all attempts."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from yuan2_core.contract import DatasetLocation
from yuan2_core.errors import DatasetError
from yuan2_core.formats import ERRORS_SHOWN, DataPart, check_errors, number_records, parts_of
from yuan2_core.processors import available_cpus
from yuan2_core.sections import Objective, Training
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.rendering import Beat, Renderer, render_all
from yuan2_trainer.data.store import SampleStore, StoreWriter

RENDERER_VERSION = 3
"""Raise it when the same records give other samples or the files of a store change: caches are made anew."""

BYTES_A_PROCESS = 4 << 20
"""Less data than this is prepared before another process has started."""

_FACTS = "facts.json"
_HASHED_AT_ONCE = 1 << 22


class Prepared(BaseModel):
    """Facts about the prepared data."""

    samples: int
    dropped_samples: int
    """Records refused and sequences left without a label."""
    longest: int
    """Tokens of the longest sequence."""
    tokens: int
    fingerprint: str
    pad_id: int
    eval_samples: int = 0
    """Sequences held out to evaluate on."""
    eval_fingerprint: str | None = None
    """Fingerprint of the evaluation's own data, if they are none of the others."""
    base_fingerprint: str = ""
    """Of the model that training starts from."""


class Facts(BaseModel):
    """What a preparation found, kept beside its store."""

    records: int = 0
    wrong: int = 0
    shown: list[str] = []
    """The first errors."""
    expected: int = 0
    """Sequences there would be if none were too long."""
    fingerprint: str = ""


def prepare(
    location: DatasetLocation,
    training: Training,
    tokenizer: Yuan2Tokenizer,
    target: Path,
    beat: Beat,
    cache: Path | None = None,
    objective: Objective | None = None,
) -> Prepared:
    """Render every conversation into a `SampleStore` at `target`.

    Args:
        location: the conversations.
        training: loss and length of the sequences.
        tokenizer: the model's.
        target: where the store, or a link to it, will be.
        beat: called again and again; raises to end the preparation.
        cache: directory for stores, named by what they were made from; one found there is used as it is.
        objective: what is learned from the data; None for SFT.

    Raises:
        DatasetError: too many records cannot be used, or too many sequences have no label left within
            `maxLength`.
    """
    store_directory = target
    objective = objective or Objective()
    if cache is not None:
        store_directory = cache / content_key(location, training, tokenizer, beat, objective)
        target.symlink_to(store_directory.absolute(), target_is_directory=True)
    if not (store_directory / _FACTS).exists():
        _make(
            store_directory,
            location,
            Renderer(tokenizer, training.loss, training.max_length, objective),
            beat,
        )
    facts = Facts.model_validate_json((store_directory / _FACTS).read_bytes())
    _check(facts, location)
    store = SampleStore.open(store_directory)
    _check_dropped(location, training, facts.expected, len(store))
    return Prepared(
        samples=len(store),
        dropped_samples=facts.expected - len(store) + facts.wrong,
        longest=int(store.lengths.max()),
        tokens=int(store.offsets[-1]),
        fingerprint=facts.fingerprint,
        pad_id=tokenizer.pad_id,
    )


def content_key(
    location: DatasetLocation,
    training: Training,
    tokenizer: Yuan2Tokenizer,
    beat: Beat,
    objective: Objective | None = None,
) -> str:
    """SHA-256 of everything that a store depends on.

    Raises:
        DatasetError: a file cannot be read.
    """
    parts = _parts(location)
    files = [[part.path.name, part.format, part.weight] for part in parts]
    settings = [RENDERER_VERSION, files, training.loss, training.max_length, tokenizer.special_ids]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(hashlib.sha256(tokenizer.model_bytes).digest())
    if objective is not None and objective.sequences > 1:
        digest.update(type(objective.settings).__name__.encode())
    for part in parts:
        digest.update(_hash_of(part.path, beat))
    return digest.hexdigest()


def _hash_of(path: Path, beat: Beat) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASHED_AT_ONCE):
                beat()
                digest.update(chunk)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.digest()


def _parts(location: DatasetLocation) -> list[DataPart]:
    return parts_of(location.path, location.format, location.files)


def data_cache(output: str) -> Path:
    """Where the attempts of a run share prepared data, until it is complete."""
    return Path(output) / "data"


def discard_cache(output: str) -> None:
    """Remove the prepared data of a run that is complete."""
    shutil.rmtree(data_cache(output), ignore_errors=True)


def _make(directory: Path, location: DatasetLocation, renderer: Renderer, beat: Beat) -> None:
    """Write a store beside its place and move it there whole; whoever comes second leaves the first one's."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        facts = _write(beside, location, renderer, beat)
        _check(facts, location)
        (beside / _FACTS).write_text(facts.model_dump_json(), encoding="utf-8")
        beside.chmod(0o755)
        try:
            beside.rename(directory)
        except OSError:
            if not (directory / _FACTS).exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(directory: Path, location: DatasetLocation, renderer: Renderer, beat: Beat) -> Facts:
    facts = Facts()
    parts = _parts(location)
    records = number_records(parts)
    with StoreWriter(directory) as writer:
        for result in render_all(records, renderer, _processes(parts), beat):
            writer.add(result.block)
            facts.records += result.records
            facts.wrong += len(result.errors)
            room = ERRORS_SHOWN - len(facts.shown)
            facts.shown += [str(error) for error in result.errors[:room]]
            facts.expected += result.expected
        facts.fingerprint = writer.finish()
    return facts


def _processes(parts: Sequence[DataPart]) -> int:
    """As many processes as have something to do for longer than they take to start."""
    try:
        size = sum(part.path.stat().st_size for part in parts)
    except OSError:
        return 1  # reading it tells what is wrong
    return max(1, min(available_cpus(), size // BYTES_A_PROCESS))


def _check(facts: Facts, location: DatasetLocation) -> None:
    check_errors(location.path, facts.records, facts.wrong, facts.shown, location.max_invalid_fraction)


def _check_dropped(location: DatasetLocation, training: Training, expected: int, kept: int) -> None:
    dropped = expected - kept
    if kept == 0 or dropped > location.max_invalid_fraction * expected:
        raise DatasetError(
            f"{location.path}: {dropped} of {expected} sequences have no answer left within "
            f"training.maxLength {training.max_length}; raise it or dataset.maxInvalidFraction"
        )
