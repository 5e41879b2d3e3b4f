"""How a process ended, and what that means for the pod's exit code and termination message."""

from __future__ import annotations

import errno
import json
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ValidationError

from yuan2_core.contract import (
    EXIT_COMPLETE,
    EXIT_CRASHED,
    EXIT_INVALID,
    EXIT_PREEMPTED,
    PEER_LOST,
    TERMINATION_LIMIT,
    Progress,
    Termination,
)
from yuan2_core.errors import UserError

_LOG = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PEER_LOST_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Connection was likely closed",
    "NCCL communicator was aborted",
    "ncclRemoteError",
)
_MESSAGE_LIMIT = 1500
"""Characters of a message: with the progress beside it, the JSON stays below `TERMINATION_LIMIT`."""


class JobError(UserError):
    """The job cannot run as it is written."""

    reason = "InvalidJob"


class OutputFullError(UserError):
    """The output volume has no room for a checkpoint or the model."""

    reason = "OutputFull"


class PreemptedError(Exception):
    """The pod was asked to end; `args[0]` says where the next attempt goes on."""


@dataclass(frozen=True)
class Outcome:
    """The end of one process."""

    exit_code: int
    reason: str
    message: str
    at: float = field(default_factory=time.time)

    @property
    def secondary(self) -> bool:
        """The process only noticed that another one had gone."""
        return self.reason == PEER_LOST

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def outcome_of(error: BaseException) -> Outcome:
    """What an exception that ends a process means."""
    if isinstance(error, PreemptedError):
        return Outcome(EXIT_PREEMPTED, "Preempted", str(error))
    if isinstance(error, UserError):
        return Outcome(EXIT_INVALID, error.reason, _one_line(str(error)))
    if isinstance(error, ValidationError):
        return Outcome(EXIT_INVALID, "InvalidJob", describe_validation(error))
    if is_full(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return Outcome(
            EXIT_INVALID, "OutputFull", f"output: no space left{where}; free space or ask for a larger claim"
        )
    return _crash(error)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a volume is full; safetensors' own carry the error number in their text
    only."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(sign in str(error) for sign in ("No space left on device", "StorageFull", "code: 28,"))


def _crash(error: BaseException) -> Outcome:
    text = _one_line(str(error)) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return Outcome(
            EXIT_CRASHED,
            "Crashed",
            f"out of memory: {text}; lower training.microBatchSize or training.maxLength, or use a higher "
            "deepspeed.stage",
        )
    if any(sign in text for sign in _PEER_LOST_SIGNS):
        return Outcome(EXIT_CRASHED, PEER_LOST, f"lost contact with another rank: {text}")
    return Outcome(EXIT_CRASHED, "Crashed", f"{type(error).__name__}: {text}")


def describe_validation(error: ValidationError) -> str:
    """All of pydantic's complaints in one line, fields named as in the JSON."""
    problems = (
        f"{'.'.join(str(part) for part in item['loc']) or 'job'}: {item['msg']}" for item in error.errors()
    )
    return _one_line("; ".join(problems))


def outcome_of_exit(rank: int, exit_code: int) -> Outcome:
    """A rank that left no word of its own: it was killed."""
    if exit_code < 0:
        hint = (
            " (often: the container's memory limit; see resources.limits.memory)" if exit_code == -9 else ""
        )
        return Outcome(EXIT_CRASHED, "Crashed", f"rank {rank} was ended by signal {-exit_code}{hint}")
    return Outcome(EXIT_CRASHED, "Crashed", f"rank {rank} ended with exit code {exit_code}")


def combine(outcomes: Mapping[int, Outcome], exit_codes: Mapping[int, int], ranks: Sequence[int]) -> Outcome:
    """One outcome for the node from those of its ranks.

    Invalid input wins (it explains every other end), then a preemption that all ranks agreed on, then the
    first crash, where a rank killed without a word comes before those that merely lost contact with it.
    """
    unexplained = {
        rank: outcome_of_exit(rank, code)
        for rank, code in exit_codes.items()
        if code != EXIT_COMPLETE and rank not in outcomes
    }
    ends = {**outcomes, **unexplained}
    failed = {rank: end for rank, end in ends.items() if end.exit_code != EXIT_COMPLETE}
    if not failed:
        if set(ranks) <= set(ends):
            return ends[min(ends)]
        return Outcome(EXIT_CRASHED, "Crashed", "the ranks ended without saying how")
    return min(failed.items(), key=lambda item: _weight(item[1], item[0] in unexplained))[1]


def _weight(end: Outcome, unexplained: bool) -> tuple[int, float]:
    if end.exit_code == EXIT_INVALID:
        return 0, end.at
    if unexplained:
        # torchrun ends the surviving ranks with SIGTERM: that says nothing about the cause.
        return (4 if f"signal {int(signal.SIGTERM)}" in end.message else 1), 0.0
    if end.exit_code == EXIT_PREEMPTED:
        return 3, end.at
    return (2 if end.secondary else 1), end.at


def termination_text(outcome: Outcome, progress: Progress | None) -> str:
    """The termination message, within the bytes that the kubelet keeps."""
    message = outcome.message
    while True:
        text = Termination(reason=outcome.reason, message=message, progress=progress).to_json()
        excess = len(text.encode()) - TERMINATION_LIMIT
        if excess <= 0:
            return text
        message = message[: max(0, len(message) - excess - 1)] + "…" if len(message) > excess else ""
        progress = None if not message else progress


def write_termination(path: Path, outcome: Outcome, progress: Progress | None) -> None:
    """Leave the termination message; a log that cannot be written must not hide the exit code."""
    try:
        path.write_text(termination_text(outcome, progress), encoding="utf-8")
    except OSError as error:
        _LOG.warning("termination log %s: %s", path, error.strerror)


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _MESSAGE_LIMIT else joined[: _MESSAGE_LIMIT - 1] + "…"
