"""Mutation testing of the pure packages: mutation.py [PACKAGE ...], all of them without one.

Each package is laid out with its unit tests in build/mutation/PACKAGE, where mutmut changes one thing at a
time and runs the tests that reach it. Printed are the mutants that no test noticed, as differences, and the
rate by package. docs/mutation.md tells what the last reading of them found.
"""

import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"
SOURCES = (
    "core/yuan2_core",
    "core/yuan2_model",
    "trainer_image/yuan2_trainer",
    "server_image/yuan2_server",
    "operator/yuan2_operator",
    "deploy/local/yuan2_local",
)
UNNOTICED = (0, 33)
"""Exit codes of a mutant whose tests passed, and of one that no test reaches (mutmut's own)."""
SETTINGS = """
[tool.pytest.ini_options]
addopts = "--strict-markers --import-mode=importlib -p no:cacheprovider"
pythonpath = ["src", "."]
asyncio_mode = "auto"
markers = ["gpu", "root", "cluster", "node"]

[tool.mutmut]
source_paths = ["src"]
only_mutate = {files}
pytest_add_cli_args = ["-q", "-x", "--hypothesis-seed=0"]
pytest_add_cli_args_test_selection = {tests}
use_git_change_detection = false
track_dependencies = false
timeout_multiplier = 5.0
timeout_constant = 2.0
"""


@dataclass(frozen=True)
class Package:
    """What is mutated, and the tests that must notice; globs below `src` and below the repository."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


_CORE, _TRAINER, _OPERATOR = "tests/unit/core", "tests/unit/trainer", "tests/unit/operator"
_GOLDEN = "tests/golden"
PACKAGES = {
    "conversation": Package(
        ("yuan2_core/conversation.py",), (f"{_CORE}/test_conversation.py", f"{_GOLDEN}/test_render.py")
    ),
    "packing": Package(
        ("yuan2_trainer/data/packing.py",),
        (f"{_TRAINER}/test_data_packing.py", f"{_TRAINER}/test_families.py"),
    ),
    "families": Package(
        ("yuan2_trainer/data/families.py",),
        (f"{_TRAINER}/test_families.py", f"{_TRAINER}/test_data_packing.py"),
    ),
    "scheduler": Package(("yuan2_server/scheduler.py",), ("tests/unit/server/test_scheduler.py",)),
    "plan": Package(
        ("yuan2_operator/plan/*.py",),
        (
            f"{_OPERATOR}/test_*_plan.py",
            f"{_OPERATOR}/test_finetune_estimate.py",
            f"{_OPERATOR}/test_service_manifests.py",
            f"{_GOLDEN}/test_*_manifests.py",
        ),
    ),
    "status": Package(
        ("yuan2_operator/status/*.py",),
        (
            f"{_OPERATOR}/test_finetune_*.py",
            f"{_OPERATOR}/test_service_[cs]*.py",
            f"{_OPERATOR}/test_machine_pods.py",
        ),
    ),
}


def lay_out(name: str, package: Package) -> Path:
    """A folder with the sources in one place, as mutmut wants them, the tests and the settings."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for source in SOURCES:
        shutil.copytree(ROOT / source, folder / "src" / Path(source).name, ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    tests = sorted(str(path.relative_to(ROOT)) for pattern in package.tests for path in ROOT.glob(pattern))
    files = [f"src/{pattern}" for pattern in package.files]
    text = SETTINGS.format(files=json.dumps(files), tests=json.dumps(tests))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return folder


def mutate(folder: Path) -> None:
    """Run mutmut in one process; its own output goes to a file."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(WORK / "tool"),
        "OMP_NUM_THREADS": "1",
        "YUAN2_SHARED_DATA": str(ROOT / os.environ.get("YUAN2_SHARED_DATA", "../shared/data")),
    }
    with (folder / "mutmut.log").open("wb") as log:
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)


def results(folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """Mutated files with the exit code of the tests for each mutant."""
    for path in sorted((folder / "mutants" / "src").rglob("*.meta")):
        codes = json.loads(path.read_text("utf-8"))["exit_code_by_key"]
        if codes:
            yield path.with_suffix(""), codes


def survivors(path: Path, codes: dict[str, int]) -> Iterator[str]:
    """The mutants of a file that no test noticed, each with what it changed."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    functions = {
        node.name: lines[node.lineno : node.end_lineno]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for key in (key for key, code in codes.items() if code in UNNOTICED):
        name = key.rpartition(".")[2]
        before = functions[re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)]
        changes = difflib.unified_diff(before, functions[name], lineterm="", n=0)
        yield "\n".join([key, *(line for line in changes if line[:2] not in ("--", "++", "@@"))])


def main(names: list[str]) -> int:
    table = [f"{'package':<14} {'mutants':>8} {'noticed':>8} {'survived':>9} {'rate':>6}"]
    for name in names or PACKAGES:
        folder = lay_out(name, PACKAGES[name])
        mutate(folder)
        counts: Counter[bool] = Counter()
        for path, codes in results(folder):
            print("\n".join(survivors(path, codes)))
            counts.update(code not in UNNOTICED for code in codes.values())
        total, noticed = counts[True] + counts[False], counts[True]
        table.append(f"{name:<14} {total:>8} {noticed:>8} {counts[False]:>9} {noticed / total:>6.1%}")
    print("\n".join(["", *table]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
