"""Choice of TCP ports on the loopback."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

LOOPBACK = "127.0.0.1"


def is_free(port: int, address: str = LOOPBACK) -> bool:
    """Whether `port` can be bound now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_ports(names: Iterable[str], address: str = LOOPBACK) -> dict[str, int]:
    """A different free port for every name; all are held open until the last is chosen."""
    with contextlib.ExitStack() as stack:
        chosen = {}
        for name in names:
            probe = stack.enter_context(contextlib.closing(socket.socket()))
            probe.bind((address, 0))
            chosen[name] = int(probe.getsockname()[1])
        return chosen


def preferred_port(preferred: int, address: str = LOOPBACK) -> int:
    """`preferred` when it is free, else any free port."""
    return preferred if is_free(preferred, address) else free_ports(["any"], address)["any"]
