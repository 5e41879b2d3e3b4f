"""docs/operations.md names every reason and every setting, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from yuan2_operator.config import Settings
from yuan2_operator.constants import Reason

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")


def first_column(header: str) -> list[str]:
    """The names in the first column of the table with that header."""
    table = PAGE.split(header, 1)[1].split("\n\n", 1)[0]
    return [
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1:2][0])
        if line.startswith("| `")
    ]


def test_every_reason_is_explained_once():
    known = [value for name, value in vars(Reason).items() if not name.startswith("_")]
    assert sorted(first_column("| reason | of | what it says |\n")) == sorted(known)


def test_every_setting_is_explained_once():
    known = [f"YUAN2_{name.upper()}" for name in Settings.model_fields]
    assert sorted(first_column("| setting | default | meaning |\n")) == sorted(known)
