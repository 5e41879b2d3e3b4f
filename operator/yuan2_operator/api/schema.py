"""Bases and field types of the custom resources, and the marks that `crd.py` reads from them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from yuan2_core.document import Contract

QUANTITY_PATTERN = r"^\+?[0-9]*\.?[0-9]+\.?([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
"""A resource quantity that is not negative (k8s.io/apimachinery, resource.Quantity)."""

QUANTITY_RULE = (
    "type(self) == int ? int(self) >= 0"
    " : isQuantity(string(self)) && !quantity(string(self)).isLessThan(quantity('0'))"
)
QUANTITY_MESSAGE = "write a quantity that is not negative, such as 4, 500m, 512Mi or 64Gi"

PATH_RULE = "self == '.' || self.split('/').all(part, !(part in ['', '.', '..']))"
PATH_MESSAGE = (
    "path is relative to the root of the claim and stays inside it: "
    "no '/' at either end, no '..'; '.' alone is the root itself"
)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules as `json_schema_extra`: pairs of an expression and what a user reads if it is false."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def list_map(*keys: str) -> dict[str, Any]:
    """Mark a list as a map by `keys`, so that appliers can own single items."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class Spec(Contract):
    """A part that a user writes: camelCase, immutable, unknown fields refused."""


class Status(Contract):
    """A part that the operator writes: as `Spec`, but fields of a newer operator are let pass."""

    model_config = ConfigDict(extra="ignore")

    def to_api(self) -> dict[str, Any]:
        """The object as it stands in the API: camelCase, times as RFC 3339 strings, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _whole_seconds(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a timestamp must carry its time zone")
    return moment.astimezone(timezone.utc).replace(microsecond=0)


def rfc3339(moment: datetime) -> str:
    """A UTC moment as the API writes it, in whole seconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


Timestamp = Annotated[
    datetime,
    AfterValidator(_whole_seconds),
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""A UTC moment in whole seconds, as Kubernetes keeps times: what is written reads back equal."""

Quantity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    Field(pattern=QUANTITY_PATTERN),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 64,
            "x-kubernetes-int-or-string": True,
            **rules((QUANTITY_RULE, QUANTITY_MESSAGE)),
        }
    ),
]
"""A resource quantity: `4`, `500m`, `64Gi`."""

DnsName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""Name of a Kubernetes object."""

ClaimRelativePath = Annotated[
    str, Field(min_length=1, max_length=1024, json_schema_extra=rules((PATH_RULE, PATH_MESSAGE)))
]
"""A path below the root of a claim."""

Text = Annotated[str, Field(max_length=4096)]
"""A short free text."""
