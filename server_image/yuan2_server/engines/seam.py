"""What the worker asks of an engine, and how an engine says that it cannot."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry

from yuan2_server.protocol import ErrorCode, RequestError
from yuan2_server.sequence import Entry


class Engine(Protocol):
    """Generates for all work that was submitted and not cancelled. It knows token ids, not text.

    What comes of a piece of work goes to its sink, from a thread of the engine's own.
    """

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        ...

    @property
    def problem(self) -> str:
        """Why nothing will be generated any more, in a sentence; empty while all is well."""
        ...

    def submit(self, work: Entry) -> None:
        """Queue a sequence, or texts whose vectors are wanted.

        Raises RequestError: a parameter that this engine does not honour, by its name; the queue is full
        (rate limit); or the engine does not work any more.
        """
        ...

    def cancel(self, work: Entry) -> None:
        """Give up a piece of work: what it holds is free within one step and its sink hears nothing more."""
        ...

    def close(self) -> None:
        """Stop; what is not finished fails."""
        ...

    def add_metrics(self, registry: CollectorRegistry) -> None:
        """Let a registry show what the engine measures."""
        ...


def gone() -> RequestError:
    """What is told to whoever asks an engine that has ended."""
    return RequestError(ErrorCode.ENGINE_OVERLOADED, "this worker does not work any more; try again")


def full(limit: int) -> RequestError:
    """What is told to whoever asks for more than `limit` requests at once."""
    return RequestError(
        ErrorCode.RATE_LIMIT,
        f"this worker takes {limit} requests at once and has as many; try again later",
    )


def hangs(seconds: float) -> str:
    """The problem of an engine that has not finished a step for so long."""
    return f"a step has been running for {seconds:.0f} s: it hangs"


def as_request_error(error: Exception) -> RequestError:
    """What a client is told about an exception of ours: its kind, not its text."""
    if isinstance(error, RequestError):
        return error
    return RequestError(ErrorCode.INTERNAL_ERROR, f"the worker failed ({type(error).__name__}); see its log")
