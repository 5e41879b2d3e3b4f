"""Preference data as pairs of samples of one conversation, which share the computation of their prompt.

DPO and ORPO compare two answers to a question. KTO judges single answers, and measures how far the model has
moved by answers that belong to other questions: each example comes with one of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from yuan2_core.conversation import Spans, render_spans
from yuan2_core.preferences import Preference
from yuan2_core.sections import KTO, Objective
from yuan2_core.tokenizer import Yuan2Tokenizer

MISMATCHED: Final = 2
"""Mark of a sample whose answer belongs to another question."""


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt, and their marks."""

    samples: tuple[Spans, Spans]
    marks: tuple[int, int]


def comparison_error(objective: Objective, items: Iterable[Preference]) -> str | None:
    """Why an objective cannot learn from some records; None if it can."""
    if objective.kto is None and any(len(item.answers) == 1 for item in items):
        return (
            "single answers with a mark (label, kto_tag), where objective.dpo and objective.orpo compare "
            "two; give chosen and rejected, or use objective.kto"
        )
    return None


def compare(
    items: Sequence[tuple[Preference, int]], objective: Objective, tokenizer: Yuan2Tokenizer, max_length: int
) -> tuple[list[Pair], int]:
    """Pairs in the order of the records, each as often as is asked for.

    Returns:
        The pairs, and how many samples there would be if none were too long.
    """
    if isinstance(objective.settings, KTO):
        wanted = _marked(items)
    else:
        wanted = [(item, item.answers, item.marks, times) for item, times in items]
    pairs: list[Pair] = []
    for item, answers, marks, times in wanted:
        samples = [_rendered(item, answer, tokenizer, max_length) for answer in answers]
        first, second = samples
        if first is not None and second is not None:
            pairs += [Pair((first, second), (marks[0], marks[1]))] * times
    return pairs, 2 * sum(times for *_, times in wanted)


_Wanted = tuple[Preference, tuple[str, ...], tuple[int, ...], int]


def _marked(items: Sequence[tuple[Preference, int]]) -> list[_Wanted]:
    """Single answers, each beside that of the next record with another question (TRL takes the next one)."""
    singles = [
        (item, answer, mark, times)
        for item, times in items
        for answer, mark in zip(item.answers, item.marks, strict=True)
    ]
    found: list[_Wanted] = []
    for place, (item, answer, mark, times) in enumerate(singles):
        # Seldom more than one or two are looked at; a copy of the rest for each would take quadratic time.
        following = (singles[at] for at in chain(range(place + 1, len(singles)), range(place)))
        other = next((text for another, text, *_ in following if another.question != item.question), answer)
        found.append((item, (answer, other), (mark, MISMATCHED), times))
    return found


def _rendered(item: Preference, answer: str, tokenizer: Yuan2Tokenizer, max_length: int) -> Spans | None:
    sequences = render_spans(item.with_answer(answer), tokenizer, "last_response", max_length)
    return sequences[0] if sequences else None
