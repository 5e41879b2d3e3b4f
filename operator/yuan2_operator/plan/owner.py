"""Who a child belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yuan2_operator.constants import API_VERSION


@dataclass(frozen=True)
class Owner:
    """Identity of a Yuan2FineTune or Yuan2Service."""

    kind: str
    name: str
    namespace: str
    uid: str
    generation: int
    api_version: str = API_VERSION

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
        )
