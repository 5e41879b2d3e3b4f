"""`samples.jsonl`: what a run's model answers to held-out questions, before and after training.

Greedy, with the key-value cache. Each rank answers its share, all ranks token by token together, because with
ZeRO-3 every forward pass needs every rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from yuan2_core.contract import TrainJob
from yuan2_core.tokenizer import Yuan2Tokenizer
from yuan2_trainer.data.holdout import HeldOut
from yuan2_trainer.evaluation.measuring import Pulse, evaluating
from yuan2_trainer.pod.workspace import read_text, replace

SAMPLES = "samples.jsonl"
SAMPLE_ANSWERS = {0: 4, 2: 4, 3: 0}
"""Questions by ZeRO stage where the job names no number: ZeRO-3 gathers the whole model for every token, 205
GB of it at 102B."""
ANSWER_TOKENS = 128
"""Longest answer: enough to see what was learned, and bounded where every token gathers a large model."""


def sample_answers(job: TrainJob) -> int:
    """Questions of a run that holds data out."""
    wanted = job.evaluation.sample_answers
    return SAMPLE_ANSWERS[job.stage] if wanted is None else wanted


@dataclass(frozen=True)
class Question:
    """A held-out sample: the tokens up to its last answer, `<sep>` included, and that answer's."""

    prompt: list[int]
    reference: list[int]


def choose_questions(held_out: HeldOut, count: int, every: int = 1) -> list[Question]:
    """At most `count` samples, spread evenly over the held-out conversations; raw text asks nothing.

    With `every` 2, of samples that are compared in pairs the first one of each.
    """
    asking = [
        index for index in held_out.indices[::every].tolist() if held_out.store.first_learned(index) > 0
    ]
    count = min(count, len(asking))
    places = np.arange(count) * len(asking) // max(1, count)
    return [_question(held_out, asking[place]) for place in places]


def _question(held_out: HeldOut, index: int) -> Question:
    store = held_out.store
    tokens = store.tokens_of(index).tolist()
    # Every loss learns the last answer and the <eod> behind it as one span.
    first = int(store.spans[store.span_offsets[index + 1] - 1, 0])
    return Question(tokens[:first], tokens[first:-1])


@dataclass
class SampleAnswers:
    """Asks the model of a run, and keeps what it answers."""

    engine: Any
    questions: list[Question]
    tokenizer: Yuan2Tokenizer
    pulse: Pulse
    at_once: int
    """Questions that a rank answers in one batch."""
    limit: int
    """Most tokens of prompt and answer together."""
    path: Path

    def write(self, step: int) -> None:
        """Answer with the weights as they are, and add that to the file; with step 0, begin it anew.

        Raises:
            AskedToEndError: nothing was written.
        """
        mine = self.questions[dist.get_rank() :: dist.get_world_size()]
        most = -(-len(self.questions) // dist.get_world_size())
        answers: list[list[int]] = []
        with evaluating(self.engine) as model:
            for first in range(0, most, self.at_once):
                prompts = [question.prompt for question in mine[first : first + self.at_once]]
                answers += self._greedy(model, prompts)
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, answers)
        if dist.get_rank() == 0:
            self._keep(step, [shares[number % len(shares)].pop(0) for number in range(len(self.questions))])

    def _keep(self, step: int, answers: list[list[int]]) -> None:
        before = [row for row in _rows(self.path) if row["step"] == 0] if step > 0 else []
        pairs = zip(self.questions, answers, strict=True)
        rows = before + [self._row(step, question, answer) for question, answer in pairs]
        replace(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _row(self, step: int, question: Question, answer: list[int]) -> dict[str, Any]:
        return {
            "step": step,
            "question": self.tokenizer.decode(question.prompt[:-1]),
            "reference": self.tokenizer.decode(question.reference),
            "answer": self.tokenizer.decode(answer),
        }

    def _greedy(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        """The most likely tokens after each prompt, up to `<eod>`, which is left out; all ranks together."""
        eod, device = self.tokenizer.eod_id, self.engine.device
        rows = prompts or [[eod]]  # a rank without a question only takes part
        width = max(len(row) for row in rows)
        ids = torch.tensor([[eod] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        room = min(ANSWER_TOKENS, self.limit - width)
        open_rows = [bool(prompts) and room > 0] * len(rows)
        answers: list[list[int]] = [[] for _ in rows]
        cache = None
        while self.pulse.beat(any(open_rows)):
            output = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, chosen = output.past_key_values, output.logits[:, -1].argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                open_rows[row] = open_rows[row] and token != eod
                if open_rows[row]:
                    answers[row].append(token)
                    open_rows[row] = len(answers[row]) < room
            ids = chosen[:, None]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
        return answers[: len(prompts)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in (read_text(path) or "").splitlines():
        yield json.loads(line)
