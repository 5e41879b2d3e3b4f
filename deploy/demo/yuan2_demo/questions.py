"""Every trained question with its history, asked through the OpenAI API, and how many answers are verbatim.

`questions`, `Answer` and `Score` are pure; `ask_all` is the edge. The end-to-end tests use the same code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

Record = Mapping[str, Any]
"""A conversation in FastChat's format: `{"id": ..., "conversations": [{"from": ..., "value": ...}, ...]}`."""

PASS_SHARE = 0.95
"""Share of verbatim answers that the demo and the end-to-end test ask for."""
MAX_TOKENS = 128
"""More than the longest trained answer has, so that an answer is cut only when it is wrong anyway."""
REQUEST_SECONDS = 120.0

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Question:
    """The messages up to one human turn, and the answer the data gives to it."""

    name: str
    """Record id and turn, `identity-zh-079/2`."""
    history: tuple[tuple[str, str], ...]
    """(OpenAI role, text) of every message, the question last."""
    expected: str

    @property
    def text(self) -> str:
        """The last message: what a reader would call the question."""
        return self.history[-1][1]

    @property
    def turn(self) -> int:
        """1 for the first question of a conversation."""
        return sum(role == "user" for role, _ in self.history)

    def messages(self) -> list[dict[str, str]]:
        """The history as the chat completions API takes it."""
        return [{"role": role, "content": text} for role, text in self.history]


@dataclass(frozen=True)
class Answer:
    """What the service said to one question."""

    question: Question
    text: str
    seconds: float
    completion_tokens: int = 0
    error: str = ""
    """Why there is no answer; empty when there is one."""

    @property
    def verbatim(self) -> bool:
        """Equal to the trained answer, character for character."""
        return not self.error and self.text == self.question.expected


@dataclass(frozen=True)
class Score:
    """All answers, in the order of the questions."""

    answers: tuple[Answer, ...]
    seconds: float
    """Wall time of asking, requests running beside each other."""

    @property
    def right(self) -> int:
        """Answers that are verbatim."""
        return sum(answer.verbatim for answer in self.answers)

    @property
    def total(self) -> int:
        """Questions asked."""
        return len(self.answers)

    @property
    def share(self) -> float:
        """`right / total`; 0 when nothing was asked, so that an empty data set never passes."""
        return self.right / self.total if self.answers else 0.0

    @property
    def passed(self) -> bool:
        """At least `PASS_SHARE` of the answers are verbatim."""
        return self.share >= PASS_SHARE

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens of all requests a second of wall time."""
        tokens = sum(answer.completion_tokens for answer in self.answers)
        return tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def wrong(self) -> tuple[Answer, ...]:
        """Answers that are not verbatim."""
        return tuple(answer for answer in self.answers if not answer.verbatim)


def load_records(path: Path) -> list[Record]:
    """The records of a FastChat JSON array. Raises OSError or ValueError when it is not one."""
    records = json.loads(path.read_text("utf-8"))
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON array of conversations")
    return records


def questions(conversations: Iterable[Record]) -> list[Question]:
    """One question a human turn, in file order; a history that occurs twice is asked once."""
    seen: dict[tuple[tuple[str, str], ...], Question] = {}
    for record in conversations:
        messages = [(_ROLES[m["from"]], m["value"]) for m in record["conversations"]]
        for i, (role, text) in enumerate(messages):
            if role != "assistant":
                continue
            history = tuple(messages[:i])
            turn = sum(r == "user" for r, _ in history)
            seen.setdefault(history, Question(f"{record['id']}/{turn}", history, text))
    return list(seen.values())


def ask(client: OpenAI, question: Question, model: str) -> Answer:
    """Ask one question at temperature 0; a refused or broken request becomes an answer with an error."""
    from openai import OpenAIError

    start = time.monotonic()
    try:
        reply = client.chat.completions.create(
            model=model,
            messages=question.messages(),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
    except OpenAIError as error:
        return Answer(question, "", time.monotonic() - start, error=f"{type(error).__name__}: {error}")
    tokens = reply.usage.completion_tokens if reply.usage else 0
    return Answer(question, reply.choices[0].message.content or "", time.monotonic() - start, tokens)


def ask_all(
    base_url: str,
    conversations: Iterable[Record],
    *,
    model: str = "yuan2",
    api_key: str = "EMPTY",
    concurrency: int = 4,
    on_answer: Callable[[Answer], None] | None = None,
) -> Score:
    """Ask every turn of every conversation, with its history, of the API at `base_url` (ending in `/v1`).

    `on_answer` is called in the order of the questions. Nothing is raised for a wrong or missing answer.
    """
    from openai import DefaultHttpxClient, OpenAI

    # The API is on this machine or forwarded to it, never behind the machine's proxy.
    direct = DefaultHttpxClient(trust_env=False)
    start = time.monotonic()
    answers: list[Answer] = []
    with (
        OpenAI(base_url=base_url, api_key=api_key, timeout=REQUEST_SECONDS, http_client=direct) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            for answer in pool.map(lambda question: ask(client, question, model), questions(conversations)):
                answers.append(answer)
                if on_answer:
                    on_answer(answer)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for the questions left
            raise
    return Score(tuple(answers), time.monotonic() - start)


def showcase(answers: Sequence[Answer], count: int) -> list[Answer]:
    """`count` answers spread evenly over the data, half of them to later turns, in the order of the data."""
    later = [i for i, answer in enumerate(answers) if answer.question.turn > 1]
    first = [i for i, answer in enumerate(answers) if answer.question.turn == 1]
    chosen = _spread(later, count // 2)
    chosen += _spread(first, count - len(chosen))
    return [answers[i] for i in sorted(chosen)]


def _spread(items: Sequence[int], count: int) -> list[int]:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
