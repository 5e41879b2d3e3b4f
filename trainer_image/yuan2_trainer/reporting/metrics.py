"""`metrics.jsonl`: a line an optimizer step, and one an evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from yuan2_trainer.reporting.progress import EvaluationReport, StepReport

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends reports; a resumed run first drops the lines of steps and evaluations that it will do again.

    Args:
        path: of the log.
        resumed_step: of the checkpoint that the run goes on from; 0 begins anew.
        evaluated_step: of the last evaluation that the checkpoint knows of.
    """

    def __init__(self, path: Path, resumed_step: int, evaluated_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        last_evaluation = -1 if evaluated_step is None else evaluated_step
        kept = [
            json.dumps(row)
            for row in read_metrics(path)
            if row["step"] <= (last_evaluation if "evalLoss" in row else resumed_step)
        ]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(f"{line}\n" for line in kept if resumed_step), encoding="utf-8")
        beside.replace(path)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def append(self, report: StepReport | EvaluationReport) -> None:
        """Write a line; what is not known, or no finite number, is null."""
        row: dict[str, Any] = asdict(report)
        row.update({f"rewards_{name}": value for name, value in (row.pop("rewards") or {}).items()})
        if isinstance(report, StepReport):
            row["tokens_per_second"] = report.tokens_per_second
        line = {to_camel(name): _finite(value) for name, value in row.items()}
        self._stream.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Sync the file: what a finished run leaves behind."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log in order, without one that a crash cut short; nothing where there is no log."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue
            yield row


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
