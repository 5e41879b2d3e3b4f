"""Who may write an output: one run at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.constants import CONDITION_COMPLETE, CONDITION_FAILED, Reason
from yuan2_operator.plan.references import Rejection


def reject_taken(
    spec: FineTuneSpec, name: str, *, begun: bool, since: str, others: Iterable[Mapping[str, Any]]
) -> Rejection | None:
    """The refusal of a run whose output another one writes, or will write first; None if there is none.

    Args:
        spec: of the run.
        name: of the run.
        begun: it has had an attempt.
        since: when it was made, as the API writes times.
        others: the other Yuan2FineTunes of its namespace, as the API server sends them.
    """
    mine = spec.output.persistent_volume_claim
    for other in sorted(others, key=lambda body: str(body["metadata"]["name"])):
        place = other.get("spec", {}).get("output", {}).get("persistentVolumeClaim", {})
        if (place.get("claimName"), place.get("path")) != (mine.claim_name, mine.path) or _over(other):
            continue
        if _begun(other) or (not begun and _precedes(other, (since, name))):
            first = other["metadata"]["name"]
            text = (
                f"output: Yuan2FineTune {first} writes directory {mine.path} of claim {mine.claim_name}; "
                f"choose another path, or wait until {first} has ended"
            )
            return Rejection(Reason.OUTPUT_IN_USE, text)
    return None


def _over(other: Mapping[str, Any]) -> bool:
    """It has ended, or is going."""
    conditions = other.get("status", {}).get("conditions", ())
    ended = (CONDITION_COMPLETE, CONDITION_FAILED)
    return "deletionTimestamp" in other["metadata"] or any(
        entry["type"] in ended and entry["status"] == "True" for entry in conditions
    )


def _begun(other: Mapping[str, Any]) -> bool:
    return bool(other.get("status", {}).get("attempt"))


def _precedes(other: Mapping[str, Any], mine: tuple[str, str]) -> bool:
    """Of two that have not begun the older one goes first."""
    metadata = other["metadata"]
    return (str(metadata.get("creationTimestamp", "")), str(metadata["name"])) < mine
