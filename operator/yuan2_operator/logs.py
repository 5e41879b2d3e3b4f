"""What the operator logs: lines for people, or JSON objects with the resource as fields."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone

_SUBJECT: ContextVar[dict[str, str | int] | None] = ContextVar("subject", default=None)
"""Kind, namespace, name and attempt that the running task works on."""


@contextmanager
def about(**fields: str | int) -> Iterator[None]:
    """Everything that is logged inside has these fields, beside those around it."""
    token = _SUBJECT.set({**(_SUBJECT.get() or {}), **fields})
    try:
        yield
    finally:
        _SUBJECT.reset(token)


def note_attempt(number: int) -> None:
    """The running pass is about this attempt."""
    subject = _SUBJECT.get()
    if subject is not None:
        subject["attempt"] = number


class JsonFormatter(logging.Formatter):
    """A JSON object a line, for log collectors."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **(_SUBJECT.get() or {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
