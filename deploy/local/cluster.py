#!/usr/bin/env python3
"""A real one-node Kubernetes on this machine: `python3 deploy/local/cluster.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from yuan2_local.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
