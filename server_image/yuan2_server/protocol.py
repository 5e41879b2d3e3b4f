"""What goes over the wire between FastChat's programs and a model worker (FastChat 0.2.36).

A request is JSON; the answer to `/worker_generate_stream` is JSON documents, each ended by a zero byte, whose
`text` is cumulative. Fields that FastChat does not know (`messages`, `seed`, `deltas` ...) are extensions of
ours: foreign workers ignore them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

DELIMITER = b"\0"
"""Ends each JSON document of a stream."""
SEP_STYLE_YUAN2 = 19
"""FastChat's `SeparatorStyle.YUAN2`: the number in the released package, which counts its members."""
MAX_LOGPROBS = 20
"""Alternatives a request may ask for at each token (OpenAI's limit)."""
MAX_STOPS = 32
MAX_STOP_LENGTH = 256
"""Stop strings and their characters: each token's text is compared with all of them."""
MAX_TEXTS = 2048
"""Texts of one request for embeddings (OpenAI's limit)."""

FinishReason = Literal["stop", "length"]


class ErrorCode(IntEnum):
    """FastChat's `ErrorCode`; the first three digits are the HTTP status it stands for."""

    VALIDATION_TYPE_ERROR = 40001
    INVALID_AUTH_KEY = 40101
    INCORRECT_AUTH_KEY = 40102
    NO_PERMISSION = 40103
    INVALID_MODEL = 40301
    PARAM_OUT_OF_RANGE = 40302
    CONTEXT_OVERFLOW = 40303
    RATE_LIMIT = 42901
    QUOTA_EXCEEDED = 42902
    ENGINE_OVERLOADED = 42903
    INTERNAL_ERROR = 50001
    CUDA_OUT_OF_MEMORY = 50002
    CONTROLLER_NO_WORKER = 50005
    CONTROLLER_WORKER_TIMEOUT = 50006


class RequestError(Exception):
    """A request that gets an error instead of an answer: FastChat's code, one sentence for the client and,
    where one is to blame, the name of the field."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class Message(BaseModel):
    """One message of a conversation, as OpenAI has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateRequest(BaseModel):
    """Body of `/worker_generate` and `/worker_generate_stream`. A null field has its default, but for
    `max_new_tokens`, where it means as long as the context allows."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    model: str
    prompt: str | None = None
    """Text of the prompt; special tokens in it are atomic."""
    prompt_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """The prompt's tokens. When present `prompt` is only for workers that do not know this field."""
    messages: tuple[Message, ...] | None = None
    """The conversation itself. When present the worker renders it and `prompt` is only for workers that
    cannot."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Most likely tokens to choose among; -1 and 0 mean all."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Factor for the scores of tokens that were there before; beyond these bounds scores overflow."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1)] | None = 256
    """Longest answer in tokens."""
    clamp: bool = True
    """A longer answer than the context has room for is cut to that, as FastChat's worker does; False refuses
    the request."""
    echo: bool = False
    """The text starts with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives to report at each token; 0 reports the chosen ones only."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...],
        Field(max_length=MAX_STOPS),
    ] = ()
    stop_token_ids: Annotated[tuple[int, ...], Field(max_length=1024)] = ()
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    seed: int | None = None
    deltas: bool = False
    """Documents hold what is new in them instead of everything so far, and say so (`delta`)."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if given is not None or name == "max_new_tokens"}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @classmethod
    def parse(cls, body: Mapping[str, Any], *, served: tuple[str, ...]) -> GenerateRequest:
        """Check one request. Raises RequestError with FastChat's code and the field's name."""
        try:
            request = cls.model_validate(body)
        except ValidationError as error:
            raise _as_request_error(error) from None
        request._refuse_unsupported(served)
        return request

    def _refuse_unsupported(self, served: tuple[str, ...]) -> None:
        check_served(self.model, served)
        if self.prompt is None and self.messages is None and self.prompt_ids is None:
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "prompt: required", "prompt")
        refusals = (
            ("use_beam_search", self.use_beam_search, "beam search is not supported; leave it out"),
            ("n", self.n != 1, f"{self.n} is not supported; send one request for each answer"),
            (
                "best_of",
                self.best_of is not None and self.best_of > self.n,
                f"{self.best_of} is greater than n, {self.n}, and is not supported; leave it out",
            ),
            (
                "best_of",
                self.best_of is not None and self.best_of < 1,
                f"{self.best_of} is less than the minimum of 1",
            ),
        )
        for field, refused, message in refusals:
            if refused:
                raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, f"{field}: {message}", field)


def check_served(model: str, served: tuple[str, ...]) -> None:
    """Raises RequestError for a model that is not one of the `served`."""
    if model not in served:
        message = f"model: {model!r} is not served here; use one of {', '.join(served)}"
        raise RequestError(ErrorCode.INVALID_MODEL, message, "model")


_RANGE_ERRORS = frozenset(
    {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "finite_number",
        "string_too_short",
        "string_too_long",
        "too_long",
    }
)


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "body"
    code = ErrorCode.PARAM_OUT_OF_RANGE if first["type"] in _RANGE_ERRORS else ErrorCode.VALIDATION_TYPE_ERROR
    if first["type"] == "extra_forbidden":
        return RequestError(code, f"{field}: this worker has no such parameter; leave it out", field)
    return RequestError(code, f"{field}: {first['msg']}", field)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. The `<eod>` that ends an answer is not counted."""

    prompt_tokens: int
    completion_tokens: int

    def to_dict(self) -> dict[str, int]:
        """The JSON of FastChat and OpenAI."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class TokenLogprob:
    """The logarithm of a token's probability, and of its best alternatives, before temperature and
    penalties."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: what is new in it, and the tokens of the whole so far."""

    text: str
    usage: Usage
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def then(self, later: Chunk) -> Chunk:
        """Both as one piece."""
        logprobs = None if later.logprobs is None else (*(self.logprobs or ()), *later.logprobs)
        return Chunk(self.text + later.text, later.usage, later.finish_reason, logprobs)

    def to_dict(self, *, delta: bool = False) -> dict[str, Any]:
        """FastChat's JSON; `logprobs` is there only when it was asked for."""
        document: dict[str, Any] = {
            "text": self.text,
            "error_code": 0,
            "usage": self.usage.to_dict(),
            "finish_reason": self.finish_reason,
        }
        if delta:
            document["delta"] = True
        if self.logprobs is not None:
            document["logprobs"] = _logprobs_to_dict(self.logprobs)
        return document


def _logprobs_to_dict(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    offsets, position = [], 0
    for entry in entries:
        offsets.append(position)
        position += len(entry.token)
    return {
        "text_offset": offsets,
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [dict(entry.top) for entry in entries],
    }


def error_document(error: RequestError) -> dict[str, Any]:
    """FastChat's JSON for a request that failed; `param` is our extension."""
    document: dict[str, Any] = {"text": error.message, "error_code": int(error.code)}
    return document if error.param is None else {**document, "param": error.param}


def encode_document(document: Mapping[str, Any]) -> bytes:
    """One document of a stream with the zero byte that ends it."""
    return json.dumps(document, ensure_ascii=False).encode() + DELIMITER
