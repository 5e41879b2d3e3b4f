"""What the engine works on: an answer being generated, or texts whose vectors are wanted. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from yuan2_server.protocol import FinishReason, RequestError

_ids = count()


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Temperature 0 takes the most likely token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Most likely tokens to choose among; 0 means all."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    """Alternatives to report at each token; None reports nothing."""
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SampledToken:
    """A chosen token; `logprob` and `top` (id, logprob) only when the request wants them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sink(Protocol):
    """Where a result goes. Called on the engine's thread, so it must be quick."""

    def fail(self, error: RequestError) -> None:
        """There will be no complete result."""
        ...


class TokenSink(Sink, Protocol):
    """Where a sequence's tokens go."""

    def accept(self, token: SampledToken) -> bool:
        """Take one token that is part of the answer; True means that the answer ends here."""
        ...

    def finish(self, reason: FinishReason) -> None:
        """The answer is complete."""
        ...


class VectorSink(Sink, Protocol):
    """Where vectors go."""

    def finish(self, vectors: list[list[float]]) -> None:
        """One vector for each text, in their order."""
        ...


@dataclass(eq=False)
class Sequence:
    """Prompt and answer of one request, and how far the model's cache has got.

    `computed` tokens are in the cache; the rest is what the next steps run.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sink: TokenSink
    model: str = ""
    """The name that the request has for the model: an engine with adapters chooses by it."""
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    id: int = field(default_factory=lambda: next(_ids))

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def longest(self) -> int:
        """Tokens that the cache holds at the end, at most."""
        return len(self.prompt_ids) + self.params.max_new_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions `start` to `end`, prompt and answer taken as one."""
        prompt = len(self.prompt_ids)
        head = list(self.prompt_ids[start:end]) if start < prompt else []
        return head + self.output_ids[max(start - prompt, 0) : max(end - prompt, 0)]

    def append(self, token: SampledToken) -> FinishReason | None:
        """Add a chosen token, tell the sink, and say whether the answer ends with it."""
        if token.token_id in self.params.stop_token_ids:
            return "stop"
        self.output_ids.append(token.token_id)
        if self.sink.accept(token):
            return "stop"
        return "length" if len(self.output_ids) >= self.params.max_new_tokens else None


@dataclass(eq=False)
class Embedding:
    """Texts of one request, run one after the other; to the scheduler it is a sequence that takes its turns.

    `computed` counts the tokens of the current text that were run.
    """

    texts: tuple[tuple[int, ...], ...]
    sink: VectorSink
    vectors: list[list[float]] = field(default_factory=list)
    computed: int = 0
    id: int = field(default_factory=lambda: next(_ids))

    @property
    def length(self) -> int:
        """Tokens of the current text."""
        return len(self.texts[len(self.vectors)])

    @property
    def longest(self) -> int:
        """The same: nothing is added to a text."""
        return self.length

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of the current text from `start` to `end`."""
        return list(self.texts[len(self.vectors)][start:end])

    def append(self, vector: list[float]) -> bool:
        """Add the current text's vector and go on to the next one; True when there is none."""
        self.vectors.append(vector)
        self.computed = 0
        return len(self.vectors) == len(self.texts)


Entry = Sequence | Embedding
