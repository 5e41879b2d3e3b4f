"""What an ended attempt costs a run: restarts, disruptions, and the wait before the next attempt. Pure.

Progress is a newer complete checkpoint: steps after it are trained again, so they do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from yuan2_core.contract import Progress
from yuan2_operator.api.finetune import Attempt
from yuan2_operator.api.run_policy import RunPolicy
from yuan2_operator.constants import Reason

SHORT_ATTEMPT = timedelta(seconds=60)
"""An attempt that ended sooner makes the next one wait, so that nothing spins."""
RESTART_DELAY_LIMIT = timedelta(seconds=300)
OFFENCES = 2
"""Failures of one run that point to the same node before it is avoided: once may be chance."""
NODES_KEPT = 64
"""Nodes whose failures a status remembers."""


def heard(attempt: Attempt, said: Progress) -> dict[str, int]:
    """Fields of an attempt that what its rank 0 says has changed."""
    newest = said.last_checkpoint_step or said.resumed_from_step or 0
    fields = {"resumed_from_step": said.resumed_from_step or 0, "checkpoint_step": newest}
    return {name: value for name, value in fields.items() if value > (getattr(attempt, name) or -1)}


def progressed(attempts: Sequence[Attempt]) -> bool:
    """Whether the newest attempt has completed a checkpoint that is newer than what it began with."""
    newest, earlier = attempts[-1], attempts[:-1]
    begin = max([newest.resumed_from_step or 0, *(before.checkpoint_step or 0 for before in earlier)])
    return (newest.checkpoint_step or 0) > begin


def fruitless(attempts: Sequence[Attempt]) -> bool:
    """Whether the newest attempt is known to have made no progress.

    One whose pods ran and whose rank 0 was never heard (it cannot be asked) may have made some; one that
    only waited for nodes had no chance to.
    """
    newest = attempts[-1]
    if newest.reason == Reason.PODS_NOT_TOGETHER or (
        newest.running_time is not None and newest.checkpoint_step is None
    ):
        return False
    return not progressed(attempts)


def budget_is_back(attempts: Sequence[Attempt], policy: RunPolicy, now: datetime) -> bool:
    """Whether the used restarts are given back when the newest attempt ends.

    Since the last counted failure the run must have completed a newer checkpoint, and
    `restartWindowSeconds` must have passed.
    """
    earlier = attempts[:-1]
    failed = [index for index, attempt in enumerate(earlier) if attempt.counted]
    last = failed[-1] if failed else 0
    if not any(progressed(attempts[: end + 1]) for end in range(last + bool(failed), len(attempts))):
        return False
    ended = earlier[last].end_time if failed else None
    return ended is None or now >= ended + timedelta(seconds=policy.restart_window_seconds)


def added(reasons: Mapping[str, int], reason: str) -> dict[str, int]:
    """`reasons` with one disruption more, by name."""
    return dict(sorted({**reasons, reason: reasons.get(reason, 0) + 1}.items()))


def blamed(failures: Mapping[str, int], node: str) -> dict[str, int]:
    """`failures` with one more of `node`; of very many nodes those with the most failures are kept."""
    after = added(failures, node)
    kept = sorted(after, key=lambda name: (name != node, -after[name], name))[:NODES_KEPT]
    return {name: after[name] for name in sorted(kept)}


def offenders(failures: Mapping[str, int]) -> tuple[str, ...]:
    """Nodes that failures point to again and again, by name."""
    return tuple(sorted(node for node, count in failures.items() if count >= OFFENCES))


def restart_delay(attempts: Sequence[Attempt]) -> timedelta:
    """The wait after the newest attempt: 2 s, 4 s, 8 s … for attempts in a row that came to nothing."""
    idle = sum(1 for _ in _in_vain(attempts))
    return min(timedelta(seconds=2.0**idle), RESTART_DELAY_LIMIT) if idle else timedelta(0)


def _in_vain(attempts: Sequence[Attempt]) -> Iterator[Attempt]:
    """Attempts at the end that were short, waited in vain for nodes, or left no newer checkpoint."""
    for count in range(len(attempts), 0, -1):
        attempt = attempts[count - 1]
        if attempt.outcome in (None, "Suspended"):
            return
        waited = attempt.reason == Reason.PODS_NOT_TOGETHER
        known = attempt.checkpoint_step is not None and fruitless(attempts[:count])
        if not (waited or known or duration(attempt) <= SHORT_ATTEMPT):
            return
        yield attempt


def duration(attempt: Attempt) -> timedelta:
    """From its begin to its end; zero while either is unknown."""
    if attempt.start_time is None or attempt.end_time is None:
        return timedelta(0)
    return attempt.end_time - attempt.start_time
