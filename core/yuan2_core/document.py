"""What all documents that cross a pod's border have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from typing_extensions import Self


class Contract(BaseModel):
    """camelCase JSON, immutable, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def to_json(self) -> str:
        """The document as it stands in a ConfigMap or an HTTP body: camelCase, without absent fields."""
        return self.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def read(cls, document: str | bytes) -> Self:
        """A document of a program of another version: fields that this version does not know are ignored.

        Raises:
            ValidationError: a field that it does know is missing or wrong, or the document is not JSON.
        """
        return cls.model_validate_json(document, extra="ignore")
