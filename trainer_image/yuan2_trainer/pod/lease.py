"""Which attempt an output directory belongs to.

A node that is cut off may train on while its attempt counts as lost and the next one runs. Whatever starts
takes the output's lease, and whatever is about to rename something into the output looks whether it still
holds it. Between the look and the rename there is a moment that no file system closes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ValidationError

from yuan2_core.contract import TrainJob
from yuan2_core.errors import UserError
from yuan2_trainer.pod.workspace import read_text

LEASE = "lease.json"


class SupersededError(UserError):
    """Another attempt holds the output now."""

    reason = "Superseded"


class Holder(BaseModel):
    """The content of `lease.json`."""

    namespace: str
    name: str
    uid: str
    attempt: int

    @classmethod
    def of(cls, job: TrainJob) -> Holder:
        return cls(namespace=job.namespace, name=job.name, uid=job.uid, attempt=job.attempt)

    def __str__(self) -> str:
        return f"attempt {self.attempt} of {self.namespace}/{self.name}"


def take_lease(job: TrainJob) -> None:
    """Hold the output for this attempt; its pods all say the same.

    Raises:
        SupersededError: a later attempt of the same run holds it.
    """
    own, held = Holder.of(job), _holder(job)
    if held is not None and held.uid == own.uid and held.attempt > own.attempt:
        raise _superseded(job, held)
    if held == own:
        return
    descriptor, beside = tempfile.mkstemp(prefix=f".{LEASE}.", dir=job.output)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(own.model_dump_json())
    Path(beside).chmod(0o644)
    Path(beside).replace(Path(job.output) / LEASE)


def require_lease(job: TrainJob) -> None:
    """Look whether this attempt still holds the output; where nobody does, nobody is in the way.

    Raises:
        SupersededError: another attempt holds it.
    """
    held = _holder(job)
    if held is not None and held != Holder.of(job):
        raise _superseded(job, held)


def _holder(job: TrainJob) -> Holder | None:
    text = read_text(Path(job.output) / LEASE)
    try:
        return None if text is None else Holder.model_validate_json(text)
    except ValidationError:
        return None


def _superseded(job: TrainJob, held: Holder) -> SupersededError:
    return SupersededError(
        f"output: {job.output} belongs to {held} now, so that {Holder.of(job)} ended and writes nothing; "
        "if that is another run, give one of the two another output path"
    )
