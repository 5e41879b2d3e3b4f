"""When a run stops, rests or starts again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from yuan2_core.sections import NaturalInt, PositiveInt
from yuan2_operator.api.schema import Spec

SECONDS_LIMIT = 315_360_000
"""Ten years: the longest duration that a field takes."""
Seconds = Annotated[PositiveInt, Field(le=SECONDS_LIMIT)]


class PhaseTimeouts(Spec):
    """Seconds that a phase may take by rank 0's own word before all ranks are restarted; a field that is
    absent follows from `model.size`."""

    preparing: Seconds | None = None
    """Checking and preparing the data; 4 hours when absent."""
    loading: Seconds | None = None
    """Loading the model or a checkpoint; an hour and 160 s for each billion parameters when absent."""
    evaluating: Seconds | None = None
    """A micro batch of an evaluation, or the sample answers; an hour and 72 s for each billion if absent."""
    saving: Seconds | None = None
    """What training waits for at a checkpoint; an hour and 120 s for each billion when absent."""
    exporting: Seconds | None = None
    """Writing the model or adapter at the end; an hour and 160 s for each billion when absent."""


class RunPolicy(Spec):
    """When a run stops, rests or starts again; may change while it runs."""

    suspend: bool = False
    """Stop the pods after a checkpoint; false again, the run goes on from it."""
    max_restarts: Annotated[NaturalInt, Field(le=1_000_000)] = 3
    """Failures after which the run is given up, as long as it makes no progress between them; disruptions
    do not count."""
    restart_window_seconds: Annotated[int, Field(ge=0, le=SECONDS_LIMIT)] = 3600
    """Seconds since the last failure after which a newer checkpoint gives all of `maxRestarts` back."""
    max_disruptions_without_progress: Annotated[NaturalInt, Field(le=1_000_000)] = 20
    """Disruptions (preempted, evicted, drained, deleted or lost pods) in a row, none of which leaves a newer
    checkpoint, that a run survives."""
    stall_timeout_seconds: Seconds | None = None
    """Seconds of training without an optimizer step, by rank 0's own word, after which all ranks are
    restarted; absent, half an hour and 36 s for each billion parameters, and at least ten mean steps. A
    `custom` model counts as the largest preset."""
    avoid_failed_nodes: Literal["Preferred", "Required", "Never"] = "Preferred"
    """How the next attempt avoids nodes on which two attempts have failed: `Preferred` takes them only if no
    other node fits, `Required` rather waits for other nodes."""
    start_timeout_seconds: Seconds = 1800
    """Seconds that pods which run wait for those that do not; then all give their nodes back and the attempt
    is made anew, which is not counted."""
    phase_timeout_seconds: PhaseTimeouts = Field(default_factory=PhaseTimeouts)
    """The same for the phases around the training."""
    active_deadline_seconds: Seconds | None = None
    """Seconds from the start, over all attempts, after which the run fails."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=SECONDS_LIMIT)] | None = None
    """Seconds after which the pods of a finished run are removed; the resource and its status stay."""
