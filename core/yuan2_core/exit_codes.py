"""Exit codes of pods, where a program finds them before it imports anything that takes time."""

from __future__ import annotations

EXIT_COMPLETE = 0
EXIT_CRASHED = 1
EXIT_PREEMPTED = 75
"""SIGTERM was obeyed: the next attempt goes on from the last checkpoint (EX_TEMPFAIL)."""
EXIT_INVALID = 78
"""The job, its model or its data can never work as they are: not retried (EX_CONFIG)."""
