"""Records to blocks of samples, over all processors, in the order of the file."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from yuan2_core.conversation import Conversation, Spans, render_spans, sequence_count
from yuan2_core.errors import DatasetError
from yuan2_core.formats import NumberedRecord, RecordError, convert
from yuan2_core.preferences import Preference
from yuan2_core.raw_text import Document, render_document
from yuan2_core.sections import LossMode, Objective
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.comparisons import compare, comparison_error
from yuan2_trainer.data.store import Block
from yuan2_trainer.pod.parent import die_with_parent

Beat = Callable[[], None]
"""Called again and again during the preparation: raises when it is no longer wanted."""

RECORDS_A_TASK = 256
_WAITING_TASKS = 3
"""Tasks of a process that were sent and whose result was not taken: memory does not grow with the file."""
_BEAT_SECONDS = 0.1


@dataclass(frozen=True)
class Renderer:
    """How records become samples; travels to the processes once."""

    tokenizer: Yuan2Tokenizer
    loss: LossMode
    max_length: int
    objective: Objective = field(default_factory=Objective)

    def __call__(self, records: list[NumberedRecord]) -> Result:
        """Render some records."""
        if self.objective.sequences > 1:
            return self._compared(records)
        errors: list[RecordError] = []
        sequences: list[list[Spans]] = []
        expected = 0
        for record in records:
            item = convert(record)
            if isinstance(item, RecordError):
                errors.append(item)
                continue
            assert not isinstance(item, Preference)  # those are read only where they are asked for
            made, wanted = self._sequences(item)
            sequences += made * record.times
            expected += wanted * record.times
        return Result(Block.of(sequences), len(records), expected, errors)

    def _compared(self, records: list[NumberedRecord]) -> Result:
        """Pairs of samples: two answers, or a marked answer and the one that it is measured beside."""
        items = [(convert(record, preferences=True), record.times) for record in records]
        errors = [item for item, _ in items if isinstance(item, RecordError)]
        usable = [(item, times) for item, times in items if isinstance(item, Preference)]
        wrong = comparison_error(self.objective, (item for item, _ in usable))
        if wrong is not None:
            raise DatasetError(f"{records[0].source}: {wrong}")
        pairs, expected = compare(usable, self.objective, self.tokenizer, self.max_length)
        marks = [mark for pair in pairs for mark in pair.marks]
        return Result(Block.of([pair.samples for pair in pairs], marks), len(records), expected, errors)

    def _sequences(self, item: Conversation | Document) -> tuple[list[list[Spans]], int]:
        """Samples by conversation, and how many there would be if none were too long. Each piece of a raw
        text stands for itself, so that they are shuffled."""
        if isinstance(item, Document):
            pieces = render_document(item, self.tokenizer, self.max_length)
            return [[piece] for piece in pieces], len(pieces)
        made = render_spans(item, self.tokenizer, self.loss, self.max_length)
        return [made], sequence_count(item, self.loss)


@dataclass(frozen=True)
class Result:
    """What some records gave: samples, and how many there would be if none were too long."""

    block: Block
    records: int
    expected: int
    errors: list[RecordError]


def render_all(
    records: Iterable[NumberedRecord], renderer: Renderer, processes: int, beat: Beat
) -> Iterator[Result]:
    """Results in the order of the records; with one process, in this one."""
    tasks = _tasks(records)
    if processes > 1:
        yield from _in_parallel(tasks, renderer, processes, beat)
        return
    for task in tasks:
        beat()
        yield renderer(task)


def _in_parallel(
    tasks: Iterator[list[NumberedRecord]], renderer: Renderer, processes: int, beat: Beat
) -> Iterator[Result]:
    # Spawned, because this process has threads, which a fork would leave half alive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (renderer,))
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_render, task))
            if len(pending) >= _WAITING_TASKS * processes:
                yield _wait(pending.popleft(), beat)
        while pending:
            yield _wait(pending.popleft(), beat)
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(future: Future[Result], beat: Beat) -> Result:
    beat()
    while not wait([future], _BEAT_SECONDS).done:
        beat()
    return future.result()


def _tasks(records: Iterable[NumberedRecord]) -> Iterator[list[NumberedRecord]]:
    stream = iter(records)
    while task := list(islice(stream, RECORDS_A_TASK)):
        yield task


_renderer: list[Any] = []
"""The renderer of a started process."""


def _start(renderer: Renderer) -> None:
    die_with_parent()
    _renderer.append(renderer)


def _render(records: list[NumberedRecord]) -> Result:
    result: Result = _renderer[0](records)
    return result
