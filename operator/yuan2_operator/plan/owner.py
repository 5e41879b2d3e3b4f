"""Who a child belongs to, and how it is told from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from yuan2_operator.constants import (
    API_VERSION,
    KIND_FINETUNE,
    LABEL_COMPONENT,
    LABEL_FINETUNE,
    LABEL_SERVICE,
)


@dataclass(frozen=True)
class Owner:
    """Identity of a Yuan2FineTune or Yuan2Service."""

    kind: str
    name: str
    namespace: str
    uid: str
    generation: int
    api_version: str = API_VERSION
    version: str = field(default="", compare=False)
    """resourceVersion that was read: what is decided on it is written to this version only."""

    @classmethod
    def of(cls, resource: Mapping[str, Any]) -> Owner:
        """Read it from an object as the API server sends it."""
        metadata = resource["metadata"]
        return cls(
            kind=resource["kind"],
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata["generation"],
            version=metadata.get("resourceVersion", ""),
        )


def selector_labels(owner: Owner, component: str) -> dict[str, str]:
    """The labels that tell the pods of one component of one resource from all others; they never change."""
    kind_label = LABEL_FINETUNE if owner.kind == KIND_FINETUNE else LABEL_SERVICE
    return {kind_label: owner.name, LABEL_COMPONENT: component}


def label_selector(labels: Mapping[str, str]) -> str:
    """Labels as the string that lists and the scale subresource take."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def digest(*parts: str) -> str:
    """A short stable hash for annotations."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
