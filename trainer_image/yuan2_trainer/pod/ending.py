"""How a training process ends: an outcome, told and left with its exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from yuan2_core.contract import EXIT_COMPLETE, EXIT_CRASHED
from yuan2_trainer.pod.outcome import Outcome, outcome_of

_LOG = logging.getLogger(__name__)


def settle(work: Callable[[], str]) -> Outcome:
    """Do it; whatever ends it becomes an outcome, and the sentence that it returns that of success."""
    try:
        return Outcome(EXIT_COMPLETE, "Complete", work())
    except BaseException as error:  # noqa: BLE001 - whatever it is, somebody must hear of it
        outcome = outcome_of(error)
        if outcome.exit_code == EXIT_CRASHED:
            traceback.print_exc()
        return outcome


def leave(outcome: Outcome) -> NoReturn:
    """Tell the outcome and end this process at once.

    Not `sys.exit`: threads of a collective that will never end must not hold a failed rank back.
    """
    _LOG.log(logging.INFO if outcome.exit_code == EXIT_COMPLETE else logging.ERROR, outcome.message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.exit_code)
