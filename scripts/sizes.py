"""Hold the house rules: files of at most 400 lines, functions of at most 45 at the 90th percentile."""

import ast
import sys
from pathlib import Path
from statistics import median, quantiles

ROOTS = ("core", "operator", "trainer_image", "server_image", "deploy", "examples", "scripts")
FILE_LINES = 400
FUNCTION_P90 = 45


def function_lengths(source: str) -> list[int]:
    """Lines of each function in a module, decorators and docstring included."""
    nodes = ast.walk(ast.parse(source))
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def main() -> int:
    files = [path for root in ROOTS for path in Path(root).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    long_files = [
        f"{path}: {text.count(chr(10))} lines"
        for path, text in texts.items()
        if text.count("\n") > FILE_LINES
    ]
    lengths = [length for text in texts.values() for length in function_lengths(text)]
    p90 = quantiles(lengths, n=10)[-1]
    print(f"sizes: {len(files)} files, functions median {median(lengths):.0f}, p90 {p90:.0f} lines")
    for line in long_files:
        print(f"sizes: {line}, at most {FILE_LINES} allowed", file=sys.stderr)
    if p90 > FUNCTION_P90:
        print(f"sizes: functions p90 {p90:.0f} lines, at most {FUNCTION_P90} allowed", file=sys.stderr)
    return int(bool(long_files) or p90 > FUNCTION_P90)


if __name__ == "__main__":
    sys.exit(main())
