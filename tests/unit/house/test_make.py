"""What `make help` says of the Makefile."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_help_lists_every_target_once() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = [name for line in re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE) for name in line.split()]
    # Under `make unit` this is a make within a make, which would tell its directory too.
    quiet = ["make", "--no-print-directory", "help"]
    said = subprocess.run(quiet, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = [line.split()[1] for line in said.splitlines()]
    assert sorted(listed) == sorted(phony)
    assert all(len(line.split()) > 2 for line in said.splitlines())
    assert sorted(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE)) == sorted(phony)
