"""The bundle of `make gpu-bundle`: small, and complete enough to run from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
MOST_BYTES = 60_000_000


def test_the_bundle_runs_where_it_is_unpacked(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/gpu-check.sh", sys.executable, "--bundle"], cwd=ROOT, check=True)
    bundle = ROOT / "build/gpu-check.tar.gz"
    assert bundle.stat().st_size < MOST_BYTES
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path, filter="data")
    there = tmp_path / "gpu-check"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        ["./gpu-check.sh", sys.executable],
        cwd=there,
        env={**inherited, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "TFLOP/s of the model" in done.stdout
