"""A spec that this operator cannot read, as another version of the CRD may let one pass."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from yuan2_operator.api.common import Condition
from yuan2_operator.api.schema import Spec
from yuan2_operator.cache import Object
from yuan2_operator.client import Resource
from yuan2_operator.constants import CONDITION_ACCEPTED, Reason
from yuan2_operator.plan.owner import Owner
from yuan2_operator.reconcile.context import Context
from yuan2_operator.status.conditions import Verdict, set_condition
from yuan2_operator.status.events import condition_events

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Spec)


class _Conditions(BaseModel):
    """The part of a status that both kinds have."""

    conditions: list[Condition] = Field(default_factory=list)


async def read_spec(
    context: Context, resource: Resource, model: type[S], owner: Owner, body: Object
) -> S | None:
    """The spec of a resource; None for one that cannot be read, which is refused."""
    try:
        return model.model_validate(body["spec"])
    except ValidationError as error:
        await _refuse(context, resource, owner, body, error)
        return None


async def _refuse(
    context: Context, resource: Resource, owner: Owner, body: Object, error: ValidationError
) -> None:
    """Write `Accepted=False` with the field and what is wrong; what runs already is left as it is."""
    status: dict[str, Any] = body.get("status") or {}
    try:
        before = _Conditions.model_validate(status).conditions
    except ValidationError:
        before = []
    verdict = Verdict(CONDITION_ACCEPTED, "False", Reason.INVALID_SPEC, sentence(error))
    after = set_condition(before, verdict, now=context.clock(), generation=owner.generation)
    written = {
        "phase": "Pending",
        **status,
        "observedGeneration": owner.generation,
        "conditions": [condition.to_api() for condition in after],
    }
    if written != status:
        logger.warning("%s %s/%s: %s", owner.kind, owner.namespace, owner.name, verdict.message)
        await context.write_status(resource, owner, status, written)
        await context.tell(owner, condition_events(before, after))


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with its field as a user writes it, and the way out."""
    first = error.errors(include_url=False)[0]
    field = ".".join(["spec", *(str(part) for part in first["loc"])])
    return f"{field}: {first['msg']}; correct the field, or install the CRDs of this operator's version"
