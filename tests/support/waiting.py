"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], seconds: float = 30.0, every: float = 0.05) -> T:
    """The first truthy value of `look`, or AssertionError naming `what` and the last value."""
    deadline = time.monotonic() + seconds
    while True:
        value = look()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s; last: {value!r}"
        time.sleep(every)
