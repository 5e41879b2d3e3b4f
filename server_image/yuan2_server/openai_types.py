"""OpenAI's chat request, and how its messages are asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from yuan2_core.conversation import SEPARATOR
from yuan2_core.errors import MessageError
from yuan2_core.messages import Dialogue, read_dialogue
from yuan2_server.openai_errors import invalid
from yuan2_server.openai_params import Sampling, Strict, read
from yuan2_server.protocol import MAX_LOGPROBS
from yuan2_server.upstream import Document

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
"""Parameters of OpenAI that are not supported, with the values that ask for nothing and are accepted."""
EMPTY = ("tool_calls", "annotations", "function_call", "refusal", "audio")
"""Fields that an answer of ours, sent back as the client library has it, holds empty."""


class TextPart(Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...] = ""
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Who speaks, where several do in one role: stands before the text."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: given
            for name, given in value.items()
            if given is not None and not (name in EMPTY and given in ([], ""))
        }

    @model_validator(mode="after")
    def _only_answers_may_be_empty(self) -> ChatMessage:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is required")
        return self

    def plain(self) -> dict[str, str]:
        """Role and text as `yuan2_core` and the workers take them."""
        role = "system" if self.role == "developer" else self.role
        text = (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )
        return {"role": role, "content": text if self.name is None else f"{self.name}: {text}"}


class ChatRequest(Sampling):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    """The conversation."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; absent, as long as the context allows."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    """Report the logarithms of the tokens' probabilities."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives to report at each token."""

    def spoken(self) -> list[dict[str, str]]:
        """The messages as the model was trained: question and answer in turns.

        What one side said in several messages is one of several lines; an answer in which nothing was said
        is left out, so that the questions around it are one.
        """
        spoken: list[dict[str, str]] = []
        for message in map(ChatMessage.plain, self.messages):
            if message["role"] == "assistant" and not message["content"].strip():
                continue
            if spoken and spoken[-1]["role"] == message["role"]:
                spoken[-1]["content"] += "\n" + message["content"]
            else:
                spoken.append(message)
        return spoken

    def dialogue(self) -> Dialogue:
        """The messages, checked as the renderer will. Raises OpenAIError (400)."""
        try:
            dialogue = read_dialogue(self.spoken())
        except MessageError as error:
            raise invalid("messages", str(error)) from error
        if dialogue.question is None:
            raise invalid("messages", "messages: the last message must be the user's")
        return dialogue

    def worker_params(self, index: int) -> Document:
        """The worker's request for choice `index`. Raises OpenAIError (400)."""
        params = {
            **super().worker_params(index),
            "prompt": prompt_text(self.dialogue()),
            "messages": self.spoken(),
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
        }
        return {**params, "logprobs": self.top_logprobs or 0} if self.logprobs else params


def prompt_text(dialogue: Dialogue) -> str:
    """The prompt as FastChat's `yuan2` template writes it, for workers that do not render messages
    themselves."""
    head = f"{dialogue.system}\n" if dialogue.system else ""
    said = [text for turn in dialogue.turns for text in turn]
    return head + SEPARATOR.join([*said, dialogue.question or ""]) + "<sep>"


def parse_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Check a chat request. Raises OpenAIError (400) that names the parameter."""
    request = read(ChatRequest, body, NEUTRAL)
    if request.max_tokens and request.max_completion_tokens:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens name one limit; give one of them")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs: needs logprobs to be true")
    return request
