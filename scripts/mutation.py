"""Mutation testing of the pure packages: mutation.py [--sample N] [--seed S] [PACKAGE ...], all without one.

Each package is laid out with its unit tests in build/mutation/PACKAGE, where mutmut changes one thing at a
time and runs the tests that reach it. Printed are the mutants that no test noticed, as differences, and the
rate by package, with its 95% confidence interval where only a sample of the mutants ran. docs/mutation.md
tells what the last reading of them found.
"""

import argparse
import ast
import difflib
import json
import math
import os
import random
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
NAMES = """
import sys
from pathlib import Path
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name
for path in map(Path, sys.argv[1:]):
    for name in mutate_file_contents(str(path), path.read_text("utf-8")).mutant_names:
        print(get_mutant_name(path, name))
"""
"""Prints the mutants of files; a program of its own, because mutmut reads its settings where it runs."""
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
    "scheduler": Package(("yuan2_server/engines/builtin/scheduler.py",), ("tests/unit/server/test_scheduler.py",)),
    "plan": Package(
        ("yuan2_operator/plan/*.py",),
        (
            f"{_OPERATOR}/test_finetune_*.py",
            f"{_OPERATOR}/test_service_*.py",
            f"{_OPERATOR}/test_machine_pods.py",
            f"{_GOLDEN}/test_*_manifests.py",
        ),
    ),
    "status": Package(
        ("yuan2_operator/status/*.py",),
        (
            f"{_OPERATOR}/test_finetune_*.py",
            f"{_OPERATOR}/test_service_*.py",
            f"{_OPERATOR}/test_machine_p*.py",
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


def environment() -> dict[str, str]:
    """Of mutmut and the tests that it runs."""
    return {
        **os.environ,
        "PYTHONPATH": str(WORK / "tool"),
        "OMP_NUM_THREADS": "1",
        "YUAN2_SHARED_DATA": str(ROOT / os.environ.get("YUAN2_SHARED_DATA", "../shared/data")),
    }


def mutants(folder: Path, package: Package) -> list[str]:
    """Names of all mutants of a package, sorted."""
    files = sorted(path for pattern in package.files for path in (folder / "src").glob(pattern))
    command = [sys.executable, "-c", NAMES, *(str(path.relative_to(folder)) for path in files)]
    found = subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True, text=True)
    return sorted(found.stdout.split())


def mutate(folder: Path, names: list[str]) -> None:
    """Run mutmut in one process, on these mutants or on all; its own output goes to a file."""
    with (folder / "mutmut.log").open("wb") as log:
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
        subprocess.run(command, cwd=folder, env=environment(), stdout=log, stderr=log, check=True)


def interval(noticed: int, ran: int, of: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a rate, narrowed because `ran` is a share of finitely many (`of`)."""
    if ran == of:
        return noticed / ran, noticed / ran
    rate, z2 = noticed / ran, 1.96**2 * (of - ran) / (of - 1)
    middle = (rate + z2 / (2 * ran)) / (1 + z2 / ran)
    half = math.sqrt(z2 * (rate * (1 - rate) / ran + z2 / (4 * ran**2))) / (1 + z2 / ran)
    return middle - half, middle + half


def results(folder: Path) -> Iterator[tuple[Path, dict[str, int | None]]]:
    """Mutated files with the exit code of the tests for each mutant, None where it did not run."""
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


def judge(name: str, sample: int | None, seed: int) -> str:
    """Run one package, print what survived, and give its line of the table."""
    folder = lay_out(name, PACKAGES[name])
    every = mutants(folder, PACKAGES[name])
    drawn = sorted(random.Random(seed).sample(every, sample)) if sample and sample < len(every) else []  # noqa: S311
    mutate(folder, drawn)
    counts: Counter[bool] = Counter()
    for path, codes in results(folder):
        ran = {key: code for key, code in codes.items() if code is not None}
        print("\n".join(survivors(path, ran)))
        counts.update(code not in UNNOTICED for code in ran.values())
    total, noticed = counts.total(), counts[True]
    low, high = interval(noticed, total, len(every))
    return (
        f"{name:<14} {len(every):>8} {total:>6} {noticed:>8} {counts[False]:>9} {noticed / total:>6.1%}"
        f" {low:>8.1%} to {high:.1%}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="run N mutants of each package, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=", ".join(PACKAGES))
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.packages) - set(PACKAGES)):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(PACKAGES)}")
    head = f"{'package':<14} {'mutants':>8} {'ran':>6} {'noticed':>8} {'survived':>9} {'rate':>6} {'95%':>8}"
    table = [judge(name, options.sample, options.seed) for name in options.packages or PACKAGES]
    print("\n".join(["", head, *table]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
