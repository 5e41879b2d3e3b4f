"""`python -m yuan2_trainer`: one pod of a fine-tuning."""

from __future__ import annotations

import argparse
from pathlib import Path

from yuan2_core.contract import JOB_FILE, TERMINATION_LOG
from yuan2_trainer.pod.launcher import run
from yuan2_trainer.pod.logs import configure_logging


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code of the contract."""
    parser = argparse.ArgumentParser(prog="yuan2_trainer", description=__doc__)
    parser.add_argument(
        "--job",
        type=Path,
        default=Path(JOB_FILE),
        help="the TrainJob to run, or the job.json of a run's output (default %(default)s)",
    )
    parser.add_argument(
        "--termination-log", type=Path, default=Path(TERMINATION_LOG), help="where to leave the last word"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write there, not where the job says: to run again the job.json of an output",
    )
    options = parser.parse_args(arguments)
    configure_logging("launcher")
    return run(options.job, options.termination_log, options.output)
