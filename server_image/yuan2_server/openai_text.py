"""OpenAI's requests about plain text: completions, embeddings, and vLLM's /tokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from yuan2_server.openai_errors import invalid
from yuan2_server.openai_params import Sampling, Strict, read
from yuan2_server.openai_types import ChatMessage, ChatRequest
from yuan2_server.protocol import MAX_LOGPROBS, MAX_TEXTS
from yuan2_server.upstream import Document

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)]
TextOrTokens = Text | TokenIds

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
}
"""Parameters of OpenAI's completions that are not supported, with the values that ask for nothing."""


def _listed(value: Any) -> Any:
    """One text, or the token ids of one, as a list of it."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return (value,)
    return value


class CompletionRequest(Sampling):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[tuple[TextOrTokens, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    """Texts, or token ids of texts; special tokens in a text are atomic."""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    """Longest answer in tokens."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives to report at each token; 0 reports the chosen ones only."""
    echo: bool = False
    """The text starts with the prompt."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Answers to choose the best `n` of; only `n` itself."""

    _as_list = field_validator("prompt", mode="before")(_listed)

    @property
    def count(self) -> int:
        """Answers to all prompts."""
        return len(self.prompt) * self.n

    def worker_params(self, index: int) -> Document:
        """The worker's request for choice `index`: `n` for each prompt."""
        prompt = self.prompt[index // self.n]
        return {
            **super().worker_params(index % self.n),
            **({"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": list(prompt)}),
            "max_new_tokens": self.max_tokens,
            "echo": self.echo,
            **({} if self.logprobs is None else {"logprobs": self.logprobs}),
        }


def parse_completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Check a completion request. Raises OpenAIError (400) that names the parameter."""
    request = read(CompletionRequest, body, NEUTRAL)
    if request.best_of is not None and request.best_of != request.n:
        raise invalid("best_of", f"best_of: only n itself, {request.n}, is supported; leave it out")
    if request.echo and request.logprobs is not None:
        raise invalid("echo", "echo: the prompt's log-probabilities are not computed; leave out logprobs")
    return request


class EmbeddingsRequest(Strict):
    """Body of `POST /v1/embeddings`."""

    model: Annotated[str, Field(max_length=256)]
    """Name of the model."""
    input: Annotated[tuple[TextOrTokens, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    """Texts, or token ids of texts."""
    encoding_format: Literal["float", "base64"] = "float"
    """How vectors are written."""
    user: str = ""
    """Who asks, as the client knows them; goes into the log."""

    _as_list = field_validator("input", mode="before")(_listed)


def parse_embeddings_request(body: Mapping[str, Any]) -> EmbeddingsRequest:
    """Check an embeddings request. Raises OpenAIError (400) that names the parameter."""
    return read(EmbeddingsRequest, body, {"dimensions": ()})


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`."""

    model: Annotated[str, Field(max_length=256)]
    """Name of the model."""
    prompt: str | None = None
    """A text; special tokens in it are atomic."""
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    """A conversation, tokenized as it is asked."""

    def worker_body(self) -> Document:
        """The worker's request. Raises OpenAIError (400)."""
        if self.messages is None:
            return {"model": self.model, "prompt": self.prompt}
        chat = ChatRequest(model=self.model, messages=self.messages)
        chat.dialogue()
        return {"model": self.model, "messages": chat.spoken()}


def parse_tokenize_request(body: Mapping[str, Any]) -> TokenizeRequest:
    """Check a request to tokenize. Raises OpenAIError (400) that names the parameter."""
    request = read(TokenizeRequest, body, {})
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "prompt: give either prompt or messages")
    return request
