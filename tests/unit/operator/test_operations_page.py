"""docs/operations.md names every reason and every setting, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from yuan2_operator.config import Settings
from yuan2_operator.constants import Reason

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "operations.md").read_text(encoding="utf-8")


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


def test_what_to_do_about_a_reason_is_said_under_its_name():
    table = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    found = {word for row in rows for word in re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", row)}
    own = {value for name, value in vars(Reason).items() if not name.startswith("_")}
    of_the_trainer = set(re.findall(r"`(\w+)`", PAGE.split("the trainer's own reason:", 1)[1].split(";")[0]))
    assert of_the_trainer <= found
    assert found <= own | of_the_trainer
