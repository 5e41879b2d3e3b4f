"""OpenAI's chat request, read strictly: a parameter is honoured or refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from yuan2_core.errors import MessageError
from yuan2_core.messages import Dialogue, read_dialogue
from yuan2_server.openai_errors import OpenAIError, invalid
from yuan2_server.protocol import MAX_LOGPROBS

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "logit_bias": ({},),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI that are not supported, with the values that ask for nothing and are accepted (null
always is)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]

    def plain(self) -> dict[str, str]:
        """Role and text as `yuan2_core` and the workers take them."""
        role = "system" if self.role == "developer" else self.role
        text = (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )
        return {"role": role, "content": text}


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    """Send the token counts in a last event."""


class ChatRequest(_Strict):
    """Body of `POST /v1/chat/completions`. `top_k` and `repetition_penalty` are FastChat's additions."""

    model: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; absent, as long as the context allows."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: int | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    """Who asks, as the client knows them; goes into the log."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def longest_answer(self) -> int | None:
        """The limit by either name."""
        return self.max_completion_tokens or self.max_tokens

    def dialogue(self) -> Dialogue:
        """The messages, checked as the renderer will. Raises OpenAIError (400)."""
        try:
            dialogue = read_dialogue([message.plain() for message in self.messages])
        except MessageError as error:
            raise invalid("messages", str(error)) from error
        if dialogue.question is None:
            raise invalid("messages", "messages: the last message must be the user's")
        return dialogue


class EmbeddingsRequest(_Strict):
    """Body of `POST /v1/embeddings`."""

    model: str
    input: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: str = ""
    """Who asks, as the client knows them; goes into the log."""

    @field_validator("input", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def parse_embeddings_request(body: Mapping[str, Any]) -> EmbeddingsRequest:
    """Check an embeddings request. Raises OpenAIError (400) that names the parameter."""
    given = {name: value for name, value in body.items() if value is not None}
    texts = given.get("input")
    if isinstance(texts, list) and any(isinstance(item, (int, list)) for item in texts):
        raise invalid(
            "input",
            "input: token ids of another tokenizer mean nothing here; send text "
            "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        )
    if "dimensions" in given:
        raise invalid(
            "dimensions", "dimensions: not supported by this server; leave it out", "unsupported_parameter"
        )
    try:
        return EmbeddingsRequest.model_validate(given)
    except ValidationError as error:
        raise _as_openai_error(error) from None


def parse_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Check a chat request. Raises OpenAIError (400) that names the parameter."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in given if name in NEUTRAL]:
        if not any(_same(given[name], neutral) for neutral in NEUTRAL[name]):
            raise invalid(
                name, f"{name}: not supported by this server; leave it out", "unsupported_parameter"
            )
        del given[name]
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [_without_nulls(message) for message in messages]
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _as_openai_error(error) from None
    _check_combinations(request)
    return request


def _check_combinations(request: ChatRequest) -> None:
    if request.max_tokens and request.max_completion_tokens:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens name one limit; give one of them")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs: needs logprobs to be true")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options: needs stream to be true")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _without_nulls(message: Any) -> Any:
    """An answer's message sent back as the client library had it carries null for all it does not use."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _as_openai_error(error: ValidationError) -> OpenAIError:
    first = error.errors(include_url=False, include_context=False)[0]
    # Inside a union pydantic adds the type it tried to the path; clients know only their own names.
    path = [str(part) for part in first["loc"] if str(part) not in ("str", "tuple[TextPart, ...]")]
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return invalid(name, f"Unrecognized request argument supplied: {name}", "unknown_parameter")
    if first["type"] == "missing":
        return invalid(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    return invalid(name, f"{name or 'body'}: {first['msg']}")
