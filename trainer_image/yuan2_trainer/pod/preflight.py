"""What can be found wrong before a device is used. No torch: it takes a fraction of a second besides the
data."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from pathlib import Path

from yuan2_core.conflicts import job_conflicts
from yuan2_core.contract import TrainJob
from yuan2_core.errors import ModelError
from yuan2_core.presets import config_differences
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_model import check_model_directory
from yuan2_model.dimensions import Dimensions
from yuan2_model.fingerprint import model_fingerprint
from yuan2_trainer.data.holdout import set_aside
from yuan2_trainer.data.prepare import Prepared, data_cache, prepare
from yuan2_trainer.data.rendering import Beat
from yuan2_trainer.model.methods import check_method, check_rows, refuse
from yuan2_trainer.pod.lease import take_lease
from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.pod.room import check_room, room_after_data, room_before_data
from yuan2_trainer.pod.workspace import Workspace


def check_job(job: TrainJob, workspace: Workspace, beat: Beat) -> Prepared:
    """Check model, tokenizer and output, then prepare the data.

    Raises:
        UserError: one line with the reason, the file and the field.
    """
    check_method(job)
    refuse(job_conflicts(job))
    dimensions = check_model(job)
    check_rows(job, dimensions)
    tokenizer = check_tokenizer(job, dimensions)
    check_output(job, dimensions)
    take_lease(job)
    cache = data_cache(job.output)
    prepared = prepare(job.dataset, job.training, tokenizer, workspace.samples, beat, cache, job.objective)
    prepared = set_aside(job, prepared, tokenizer, workspace, beat, cache)
    if prepared.longest > dimensions.max_position_embeddings:
        raise JobError(
            f"training.maxLength {job.training.max_length}: a sequence has {prepared.longest} tokens, "
            f"the model at most {dimensions.max_position_embeddings}; set training.maxLength to that or less"
        )
    check_room(Path(job.output), room_after_data(job, dimensions, prepared.samples))
    return prepared.model_copy(update={"base_fingerprint": model_fingerprint(job.model.path)})


def check_model(job: TrainJob) -> Dimensions:
    """The model's dimensions, after its files were compared with its config.json and that one with the
    preset."""
    directory = Path(job.model.path)
    facts = check_model_directory(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    problems = config_differences(config, job.model.size)
    if problems:
        raise ModelError(f"{directory}: {'; '.join(problems)}; set model.size to its size or to custom")
    return facts.dimensions


def check_tokenizer(job: TrainJob, dimensions: Dimensions) -> Yuan2Tokenizer:
    """The tokenizer of the model directory, whose ids must all have a row in the embedding."""
    tokenizer = Yuan2Tokenizer.from_pretrained(job.model.path)
    if tokenizer.vocab_size > dimensions.vocab_size:
        raise ModelError(
            f"{job.model.path}: the tokenizer has {tokenizer.vocab_size} tokens, config.json's vocab_size is "
            f"{dimensions.vocab_size}; use the tokenizer that belongs to the model"
        )
    return tokenizer


def check_output(job: TrainJob, dimensions: Dimensions) -> None:
    """The output directory can be written and has room for the data, a checkpoint and the export."""
    output = Path(job.output)
    check_writable(output)
    check_room(output, room_before_data(job, dimensions, data_cache(job.output)))


def check_writable(output: Path) -> None:
    """Make the directory, and a file in it.

    Raises:
        JobError: one of them cannot be made; with who may, and how to change that.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        if error.errno is None:
            raise JobError(f"output: {output} cannot be made: {error}") from error
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> JobError:
    """Who may write there, who tries to, and what to change. The usual case is a volume that the kubelet does
    not give to the pod's group, such as NFS with squashed root."""
    text = f"output: {output} cannot be written: {error.strerror}"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return JobError(f"{text}; mount the claim read-write")
    # Not Path.exists, which raises below a directory that may not be entered.
    place = next(path for path in (output, *output.parents) if os.path.exists(path))  # noqa: PTH110
    found, groups = place.stat(), sorted({os.getegid(), *os.getgroups()})
    ways = f"chown {os.geteuid()} {place}, or chgrp {os.getegid()} and chmod g+rwx, on the storage server"
    if found.st_uid != 0:
        owner = f"{{runAsUser: {found.st_uid}, runAsGroup: {found.st_gid}}}"
        ways += f"; or run as its owner with workers.podTemplate.spec.securityContext: {owner}"
    mode = f"{stat.S_IMODE(found.st_mode):o}"
    return JobError(
        f"{text}; the pod runs as uid {os.geteuid()} with groups {', '.join(map(str, groups))}, "
        f"and {place} belongs to uid {found.st_uid}, gid {found.st_gid} with mode {mode}: {ways}"
    )
