"""A report says what was compared, how large, on what, and whether the goal is met."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.bench.machine import first_processor, instructions, processor_name, this_machine
from tests.bench.pages import PAGE, spliced
from tests.bench.report import Report, amount, at_least, at_most, compared, percentile, plain, table

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"


def arguments(folder: Path, small: bool = False) -> argparse.Namespace:
    return argparse.Namespace(folder=folder, small=small, threads=2)


def test_pairs_give_their_median_and_their_borders_and_both_sides_in_absolute_figures() -> None:
    row = compared("speed", "FastChat", "4 layers", [(10.0, 1.0), (6.0, 2.0), (8.0, 2.0)], "samples/s")
    assert (row.value, row.least, row.most, row.pairs) == (4.0, 3.0, 10.0, 3)
    assert (row.ours, row.theirs, row.of) == (8.0, 2.0, "samples/s")


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (at_least(plain("x", 5.0, "x"), 5), True),
        (at_least(plain("x", 4.99, "x"), 5), False),
        (at_most(plain("x", 3.0, "%"), 3), True),
        (at_most(plain("x", 3.01, "%"), 3), False),
        (plain("x", 3.0, "%"), None),
    ],
)
def test_goals_are_judged_by_the_number_that_is_told(row, met):
    assert row.met is met


def test_the_table_has_a_missed_goal_in_it() -> None:
    missed = at_least(compared("speed", "FastChat", "small", [(9.0, 3.0), (8.0, 2.0)], "samples/s"), 5)
    lines = table([missed, at_most(plain("memory", 1234.5, "MB", "large"), 2000)])
    assert lines == [
        "| what | against | sizes | ours | theirs | ratio | goal | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| speed | FastChat | small | 8.50 samples/s | 2.50 samples/s | 3.50× (3 to 4, 2 pairs) | ≥ 5× |"
        " **missed** |",
        "| memory | | large | 1,234 MB | | | ≤ 2000 MB | met |",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (15010.4, "samples/s", "15,010 samples/s"),
        (12.34, "x", "12.3×"),
        (0.1512, "", "0.15"),
        (2.0, "s", "2 s"),
    ],
)
def test_amounts_have_the_digits_that_count(value, unit, text):
    assert amount(value, unit) == text


def test_a_report_names_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Report("speed", arguments(tmp_path)).write([at_most(plain("memory", 3.0, "MB"), 2)])
    found = json.loads(path.read_text())
    assert path.name == "speed.json"
    assert [(row["row"], row["met"]) for row in found["rows"]] == [("memory", False)]
    machine = found["machine"]
    assert all(machine[key] for key in ("processor", "instructions", "cores", "torch", "commit", "started"))
    assert machine["threads"] == 2
    assert machine["load"] >= 0
    printed = capsys.readouterr().out
    assert machine["processor"] in printed
    assert f"commit {machine['commit']}" in printed


def test_what_is_small_never_replaces_figures_nor_meets_a_goal(tmp_path: Path) -> None:
    path = Report("speed", arguments(tmp_path, small=True)).write([at_most(plain("memory", 1.0, "MB"), 2)])
    assert path.name == "speed-small.json"
    assert json.loads(path.read_text())["rows"][0]["met"] is None


def test_the_processor_and_what_it_can() -> None:
    facts = first_processor(CPUINFO)
    assert processor_name(facts) == "AMD EPYC (family 26, model 2)"
    assert instructions(facts, {}) == "avx2, avx512f, avx512_bf16"
    limited = instructions(facts, {"ATEN_CPU_CAPABILITY": "avx2", "HOME": "/root"})
    assert limited == "avx2, avx512f, avx512_bf16, ATEN_CPU_CAPABILITY=avx2"
    assert instructions(first_processor(ARM), {}) == "asimd, i8mm, bf16"
    assert processor_name(first_processor(ARM))


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert this_machine().commit == "unknown"


def test_a_report_takes_its_place_in_the_page_and_no_other(tmp_path: Path) -> None:
    page = (
        "a\n<!-- begin speed -->\nold\n<!-- end speed -->\nb\n<!-- begin path -->\nkept\n<!-- end path -->\n"
    )
    report = json.loads(Report("speed", arguments(tmp_path)).write([plain("memory", 3.0, "MB")]).read_text())
    made = spliced(page, "speed", report)
    assert "old" not in made
    assert "| memory | | | 3 MB | | | | |\n" in made
    assert f"Measured on {report['machine']['processor']}" in made
    assert made.startswith("a\n<!-- begin speed -->\n| what |")
    assert made.endswith("b\n<!-- begin path -->\nkept\n<!-- end path -->\n")
    assert spliced(made, "speed", report) == made
    with pytest.raises(ValueError, match="0 places"):
        spliced(page, "data", report)


def test_the_documentation_has_a_place_for_every_report(tmp_path: Path) -> None:
    report = json.loads(Report("speed", arguments(tmp_path)).write([plain("memory", 3.0, "MB")]).read_text())
    for name in ("path", "operator", "prepare", "train", "serve", "data"):
        assert spliced(PAGE.read_text(encoding="utf-8"), name, report)


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10)])
def test_a_percentile_is_the_nearest_rank(percent, value):
    assert percentile(range(10, 0, -1), percent) == value
