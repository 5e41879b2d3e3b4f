#!/usr/bin/env python3
"""`make demo` and `make demo-down`: `python3 deploy/demo/demo.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "local")]

from yuan2_demo.cli import main  # noqa: E402  (the path must be set first)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
