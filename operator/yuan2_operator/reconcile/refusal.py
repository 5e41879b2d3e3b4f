"""A spec or a status that this operator cannot read, as one of another version may be."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError

from yuan2_operator.api.common import Condition
from yuan2_operator.api.schema import Spec, Status
from yuan2_operator.cache import Object
from yuan2_operator.client import Resource
from yuan2_operator.constants import CONDITION_ACCEPTED, Reason
from yuan2_operator.plan.owner import Owner
from yuan2_operator.reconcile.context import Context
from yuan2_operator.status.conditions import Verdict, set_condition
from yuan2_operator.status.events import condition_events

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Spec)
T = TypeVar("T", bound=Status)


@dataclass(frozen=True)
class Reading(Generic[S]):
    """A spec as far as this operator can read it."""

    spec: S
    unknown: str | None = None
    """What it left out, which forbids a new attempt but not looking after one that runs."""


async def read_spec(
    context: Context, resource: Resource, model: type[S], owner: Owner, body: Object, *, runs: bool = False
) -> Reading[S] | None:
    """The spec of a resource; None for one that cannot be read, which is refused.

    Sections that a newer CRD has added and nobody has filled are left out. While an attempt `runs`, so is
    whatever else this operator does not know: it would be looked after by nobody.
    """
    try:
        return parse_spec(model, body["spec"], runs=runs)
    except ValidationError as error:
        await refuse(context, resource, owner, body, Reason.INVALID_SPEC, sentence(error))
        return None


def parse_spec(model: type[S], raw: Object, *, runs: bool) -> Reading[S]:
    """`read_spec` without its edge.

    Raises:
        ValidationError: a field is wrong, or unknown, filled and not to be left out.
    """
    try:
        return Reading(model.model_validate(raw))
    except ValidationError as error:
        unknown = [entry for entry in error.errors() if entry["type"] == "extra_forbidden"]
        filled = [entry for entry in unknown if entry["input"] not in ({}, [])]
        if len(unknown) != error.error_count() or (filled and not runs):
            raise
        return Reading(model.model_validate(raw, extra="ignore"), sentence(error) if filled else None)


async def read_final_status(
    context: Context, resource: Resource, model: type[T], owner: Owner, body: Object
) -> T | None:
    """The status of a resource whose history counts; None for one that cannot be read, which is refused.

    It is never taken for empty: a run that has ended would begin anew.
    """
    try:
        return model.model_validate(body.get("status") or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["status", *(str(part) for part in first["loc"])])
        text = (
            f"{field}: {first['msg']}; nothing is begun or ended while the status cannot be read: install "
            "the operator that wrote it, or restore it from a backup"
        )
        await refuse(context, resource, owner, body, Reason.STATUS_UNREADABLE, text)
        return None


async def refuse(
    context: Context, resource: Resource, owner: Owner, body: Object, reason: str, message: str
) -> None:
    """Write `Accepted=False`; what runs already is left as it is, and so is what cannot be read."""
    status: Object = body.get("status") or {}
    raw = status.get("conditions")
    conditions = [entry for entry in raw if isinstance(entry, dict)] if isinstance(raw, list) else []
    known = next((entry for entry in conditions if entry.get("type") == CONDITION_ACCEPTED), None)
    try:
        before = [] if known is None else [Condition.model_validate(known)]
    except ValidationError:
        before = []
    verdict = Verdict(CONDITION_ACCEPTED, "False", reason, message)
    after = set_condition(before, verdict, now=context.clock(), generation=owner.generation)
    others = [entry for entry in conditions if entry is not known]
    written = {
        "phase": "Pending",
        **status,
        "observedGeneration": owner.generation,
        "conditions": [after[0].to_api(), *others],
    }
    if written != {**status, "conditions": [*([known] if known else []), *others]}:
        logger.warning("%s %s/%s: %s", owner.kind, owner.namespace, owner.name, message)
        await context.write_status(resource, owner, status, written)
        await context.tell(owner, condition_events(before, after))


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with its field as a user writes it, and the way out."""
    first = error.errors(include_url=False)[0]
    field = ".".join(["spec", *(str(part) for part in first["loc"])])
    return f"{field}: {first['msg']}; correct the field, or install the CRDs of this operator's version"
