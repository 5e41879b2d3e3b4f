"""What a resource refers to by name, and the refusal when it is not there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from yuan2_operator.constants import Reason

ReferenceKind = Literal["PersistentVolumeClaim", "Secret", "ConfigMap"]

_NOT_FOUND = {
    "PersistentVolumeClaim": Reason.CLAIM_NOT_FOUND,
    "Secret": Reason.SECRET_NOT_FOUND,
    "ConfigMap": Reason.CONFIG_MAP_NOT_FOUND,
}


@dataclass(frozen=True)
class Reference:
    """An object of the same namespace that must exist before pods can start."""

    kind: ReferenceKind
    name: str
    field: str
    """The field of the spec that names it."""
    key: str | None = None
    """A key that must be in it, of ConfigMaps."""


@dataclass(frozen=True)
class Missing:
    """A reference that leads nowhere."""

    reference: Reference
    key_only: bool = False
    """The object is there, its key is not."""


@dataclass(frozen=True)
class Rejection:
    """Why there is no plan: the content of `Accepted=False`."""

    reason: str
    message: str


def reject_missing(
    namespace: str, wanted: Iterable[Reference], missing: Collection[Missing]
) -> Rejection | None:
    """The refusal for the first of `wanted` that is missing, or None."""
    absent = {entry.reference: entry for entry in missing}
    for reference in wanted:
        if reference in absent:
            return _rejection(namespace, absent[reference])
    return None


def _rejection(namespace: str, missing: Missing) -> Rejection:
    reference = missing.reference
    way_out = "create it, or correct the field; it is picked up when it appears"
    if missing.key_only:
        text = (
            f"ConfigMap {reference.name}, named by {reference.field}, has no key {reference.key}: "
            "add it, or correct the field; it is picked up when it appears"
        )
        return Rejection(Reason.CONFIG_MAP_KEY_NOT_FOUND, text)
    text = (
        f"{reference.kind} {reference.name}, named by {reference.field}, does not exist in namespace "
        f"{namespace}: {way_out}"
    )
    return Rejection(_NOT_FOUND[reference.kind], text)
