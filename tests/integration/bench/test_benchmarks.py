"""Every benchmark that needs no node runs to its end, on next to nothing; its figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.bench import fleet, operating, serve
from tests.bench.operating import RUNS
from tests.support.cluster import running_control_plane
from tests.support.training import REPOSITORY

FOLDERS = ("core", "operator", "trainer_image", "server_image", "deploy/local", "deploy/demo", ".")
PAGE = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of a small run of a benchmark."""
    path = os.pathsep.join(str(REPOSITORY / part) for part in FOLDERS)
    command = [sys.executable, "-m", f"tests.bench.{name}", "--small", "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((folder / f"{name}-small.json").read_text())
    assert report["machine"]["processor"] in done.stdout
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    """Every row says how large, both sides are there, and the documentation has it."""
    documented = {line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")}
    assert rows
    assert {row["row"] for row in rows} <= documented
    for row in rows:
        assert row["sizes"], row
        if row["against"]:
            assert row["ours"] > 0, row
            assert row["theirs"] > 0, row
            assert row["least"] <= row["value"] <= row["most"], row


@pytest.mark.parametrize("name", ["prepare", "data", "train"])
def test_runs_says_what_it_compares_and_stands_in_the_documentation(tmp_path: Path, name: str) -> None:
    check(run(name, tmp_path))


@pytest.mark.cluster
def test_the_operator_handles_finetunes_one_after_the_other(control_plane: Any, tmp_path: Path) -> None:
    rows = [asdict(row) for row in operating.measure(control_plane, tmp_path, RUNS[:1], 2, rest=0.1)]
    check(rows)
    assert all(row["value"] > 10 for row in rows if row["unit"] == "MB")


@pytest.mark.cluster
def test_many_runs_at_once(tmp_path: Path) -> None:
    with running_control_plane(f"fleet-{os.getpid()}") as cluster:
        rows = [asdict(row) for row in fleet.measure(cluster, tmp_path, fleet.SMALL)]
    check(rows)
    units = {row["row"]: row["value"] for row in rows}
    assert units["memory of the operator with runs that report"] > 10
    assert units["a rank's failure to all pods of the next attempt, longest"] > 0
    assert units["writes at a cold start"] == 0


def test_both_sides_of_a_service_answer(tmp_path: Path) -> None:
    rows = [asdict(row) for row in serve.measure(tmp_path, serve.SMALL, threads=1)]
    check(rows)
    assert len(rows) == len(serve.SMALL.streams) + 2
