"""The operator's settings: environment variables `YUAN2_*`, read once at the start and passed in."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from yuan2_operator.plan.pod_template import PRIVILEGES


class Settings(BaseSettings):
    """What whoever installs the operator decides."""

    model_config = SettingsConfigDict(
        env_prefix="YUAN2_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    train_image: str = ""
    """Trainer image of every Yuan2FineTune that names none."""
    serve_image: str = ""
    """Server image of every Yuan2Service that names none."""
    serve_vllm_image: str = ""
    """Image of workers with the engine vllm, where the service names none."""
    watch_namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Namespaces to serve, separated by commas; all of them when empty."""
    progress_via: Literal["auto", "ip", "proxy"] = "auto"
    """How a training pod's progress is read: from the pod's IP, or through the API server.

    `auto` takes the IP inside a cluster.
    """
    poll_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks at the progress of a run."""
    missing_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds after which a claim, ConfigMap or Secret that was missing is looked for again."""
    resync_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Seconds between two passes over everything, whether or not anything happened."""
    workers: Annotated[int, Field(ge=1, le=64)] = 8
    """Resources that are worked on at the same time."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of /healthz, /readyz and /metrics; 0 takes a free one."""
    lease_namespace: str = ""
    """Namespace of the Lease by which one of several replicas works; empty for a single one without Lease."""
    metrics_label: str = ""
    """Label of Yuan2FineTunes by whose value GPU time is told apart, such as a team or a cost centre."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    log_format: Literal["text", "json"] = "text"
    """A line for people, or a JSON object a line."""

    pod_privileges: Annotated[tuple[str, ...], NoDecode] = ()
    """What podTemplate may ask for beyond the restricted Pod Security Standard, separated by commas: a name
    for all namespaces, NAMESPACE/NAME for one."""

    @field_validator("pod_privileges")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if entry.rpartition("/")[2] not in PRIVILEGES:
                raise ValueError(
                    f"{entry}: write NAME or NAMESPACE/NAME, with one of {', '.join(PRIVILEGES)}"
                )
        return value

    @field_validator("watch_namespaces", "pod_privileges", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
