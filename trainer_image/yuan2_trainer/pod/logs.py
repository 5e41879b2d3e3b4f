"""One line a message on standard output, where `kubectl logs` finds it."""

from __future__ import annotations

import logging
import sys


def configure_logging(who: str) -> None:
    """Log at INFO with the process' name in front."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format=f"%(asctime)s {who}: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
