"""`metrics.jsonl`: a line an optimizer step."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from yuan2_trainer.progress import StepReport


class MetricsLog:
    """Appends step reports; a resumed run first drops the lines of steps that it will do again."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if _step(line) <= resumed_step] if resumed_step else []
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        beside.replace(path)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def append(self, report: StepReport) -> None:
        """Write a line; a number that is not finite becomes null, as JSON has none."""
        seconds = report.seconds
        row = asdict(report) | {"tokens_per_second": report.tokens / seconds if seconds else None}
        self._stream.write(json.dumps({name: _finite(value) for name, value in row.items()}) + "\n")

    def close(self) -> None:
        """Sync the file: what a finished run leaves behind."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
