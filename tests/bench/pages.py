"""`make bench-docs`: the tables of build/bench/*.json into docs/benchmarks.md, each between its two marks."""

from __future__ import annotations

import json
import re

from tests.bench.machine import ROOT, Machine
from tests.bench.report import FOLDER, Row, table

PAGE = ROOT / "docs" / "benchmarks.md"


def main() -> None:
    """Write the page anew and say what was put in."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.json")):
        if not path.stem.endswith("-small"):
            text = spliced(text, path.stem, json.loads(path.read_text(encoding="utf-8")))
            print(f"{path.stem}: {path}")
    PAGE.write_text(text, encoding="utf-8")


def spliced(page: str, name: str, report: dict[str, object]) -> str:
    """The page with the table of one report.

    Raises:
        ValueError: the page has no place for it.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    machine, rows = report["machine"], report["rows"]
    assert isinstance(machine, dict)
    assert isinstance(rows, list)
    lines = [*table([Row(**row) for row in rows]), "", f"Measured on {Machine(**machine)}.", ""]
    found, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: begin + "\n".join(lines) + end,
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{PAGE}: {count} places between {begin.strip()} and {end.strip()}, expected one")
    return found


if __name__ == "__main__":
    main()
