"""Where the time of `make test` went: durations.py FOLDER

The folder holds `stages.tsv` (stage, ok or FAILED, seconds; one a line) and, of stages that are tests, what
pytest's `--junitxml` wrote: STAGE.xml, or STAGE-*.xml where a stage runs it several times. A test's time is
that of its set-up, its body and its end, so the first one that asks for a cluster or a trained model carries
it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

SLOWEST = 20


class Test(NamedTuple):
    """A test that ran."""

    seconds: float
    stage: str
    name: str


def tests_of(path: Path) -> Iterator[Test]:
    """The tests of one stage."""
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - pytest wrote it a moment ago
        file = case.get("classname", "").replace(".", "/")
        yield Test(float(case.get("time", 0)), path.stem.partition("-")[0], f"{file}::{case.get('name')}")


def report(folder: Path) -> str:
    """Stages in their order, then the slowest tests of all of them."""
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text("utf-8").splitlines()]
    tests = [test for path in sorted(folder.glob("*.xml")) for test in tests_of(path)]
    lines = [f"{'stage':<12} {'result':<7} {'seconds':>8} {'tests':>6}"]
    for name, result, seconds in stages:
        count = sum(test.stage == name for test in tests)
        lines.append(f"{name:<12} {result:<7} {seconds:>8} {count or '':>6}")
    lines += ["", f"the {min(SLOWEST, len(tests))} slowest of {len(tests)} tests"]
    lines += [
        f"{test.seconds:8.1f} s  {test.stage:<12} {test.name}" for test in sorted(tests)[: -SLOWEST - 1 : -1]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
