"""What OpenAI's requests have in common: read strictly, a parameter is honoured or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from yuan2_server.openai_errors import OpenAIError, invalid
from yuan2_server.protocol import MAX_STOP_LENGTH, MAX_STOPS
from yuan2_server.upstream import Document


class Strict(BaseModel):
    """Unknown fields are refused, and what is no number is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    """Send the token counts in a last event."""


class Sampling(Strict):
    """Parameters of both kinds of completion. `top_k` and `repetition_penalty` are FastChat's additions."""

    model: Annotated[str, Field(max_length=256)]
    """Name of the model."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Mass of the most likely tokens to choose among."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Most likely tokens to choose among; -1 and 0 mean all."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Factor for the scores of tokens that were there before."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the scores of tokens of the answer."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """The same, times how often they are there."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Answers."""
    seed: int | None = None
    """The same seed gives the same answers."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...],
        Field(max_length=MAX_STOPS),
    ] = ()
    """Texts that end the answer and are not part of it."""
    stream: bool = False
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Options of the stream."""
    user: str = ""
    """Who asks, as the client knows them; goes into the log."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def worker_params(self, index: int) -> Document:
        """The worker's parameters for answer `index`. With a seed, each answer gets one of its own."""
        params: Document = {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": list(self.stop),
            "echo": False,
            "clamp": False,
            "deltas": True,
        }
        return params if self.seed is None else {**params, "seed": self.seed + index}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


Read = TypeVar("Read", bound=Strict)


def read(kind: type[Read], body: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> Read:
    """A request of one kind. `neutral` are parameters that are not supported, each with the values that ask
    for nothing and are accepted; null always is. Raises OpenAIError (400) that names the parameter."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in given if name in neutral]:
        if not any(_same(given[name], value) for value in neutral[name]):
            raise invalid(
                name, f"{name}: not supported by this server; leave it out", "unsupported_parameter"
            )
        del given[name]
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _as_openai_error(error) from None
    if isinstance(request, Sampling) and request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options: needs stream to be true")
    return request


def check_choices(count: int, most: int, param: str) -> None:
    """Raises OpenAIError (400) for more answers than one worker takes at once: they would never all start."""
    if count > most:
        message = f"{param}: {count} answers are more than the {most} requests that a worker takes at once"
        raise invalid(param, message)


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _as_openai_error(error: ValidationError) -> OpenAIError:
    first = error.errors(include_url=False, include_context=False)[0]
    # Inside a union pydantic adds the type it tried to the path; clients know only their own names.
    path = [str(part) for part in first["loc"] if not _is_type(str(part))]
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return invalid(name, f"Unrecognized request argument supplied: {name}", "unknown_parameter")
    if first["type"] == "missing":
        return invalid(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    return invalid(name, f"{name or 'body'}: {first['msg']}")


def _is_type(part: str) -> bool:
    return part in ("str", "int") or "[" in part
