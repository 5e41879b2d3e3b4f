"""What must still be there after a power failure."""

from __future__ import annotations

import os
from os import PathLike


def sync(path: str | PathLike[str]) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk.

    Raises:
        OSError: it cannot be opened, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
