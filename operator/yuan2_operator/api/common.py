"""Parts that both kinds have: claims with a path, conditions, the served model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from yuan2_operator.api.schema import ClaimRelativePath, DnsName, Spec, Status, Timestamp
from yuan2_operator.constants import NAME_LIMIT

ConditionStatus = Literal["True", "False", "Unknown"]

NAME_RULES = (
    (
        f"self.metadata.name.size() <= {NAME_LIMIT}",
        f"metadata.name may have at most {NAME_LIMIT} characters: "
        "names of pods and Services are built from it",
    ),
    (
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter and have only a-z, 0-9 and '-': Services are named after it",
    ),
)
"""Rules for the root of either kind; the API server's own check of names is the wider DNS subdomain."""


class ClaimPath(Spec):
    """A place in a PersistentVolumeClaim of the same namespace."""

    claim_name: DnsName
    """Name of the PersistentVolumeClaim."""
    path: ClaimRelativePath
    """Path relative to the root of the claim; `.` is the root itself."""


class ClaimLocation(Spec):
    """Where something is kept: exactly one kind of place, which today is a claim."""

    persistent_volume_claim: ClaimPath
    """A PersistentVolumeClaim and a path in it."""


class Condition(Status):
    """One aspect of the state of a resource, as metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """Which aspect."""
    status: ConditionStatus
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    """Why, as one CamelCase word for programs."""
    message: Annotated[str, Field(max_length=32768)]
    """Why, as a sentence for people: the object, the cause, the way out."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation of the spec that this was found for."""
    last_transition_time: Timestamp
    """When `status` last changed."""


class ModelPlace(Status):
    """A directory in a claim."""

    claim_name: str
    """Name of the PersistentVolumeClaim."""
    path: str
    """Directory in it, with config.json, weights and tokenizer."""


class ModelReference(ModelPlace):
    """A model directory that is complete and can be served."""

    adapter: ModelPlace | None = None
    """An adapter in PEFT's layout that belongs to the model: what LoRA and QLoRA have trained beside it."""
    fingerprint: str = ""
    """Changes whenever another run wrote the directory; pods that serve it are replaced then."""
