"""What a run exports: the weights of its best evaluation, if they can be read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.training import make_job
from yuan2_core.sections import Evaluation
from yuan2_trainer.checkpoint.checkpoints import Checkpoints
from yuan2_trainer.data.order import Course, Position
from yuan2_trainer.evaluation.judging import Judge, perplexity, preempted_before
from yuan2_trainer.evaluation.measuring import Pulse
from yuan2_trainer.evaluation.samples import sample_answers
from yuan2_trainer.evaluation.standing import Standing
from yuan2_trainer.pod.stopping import AskedToEndError, Vote
from yuan2_trainer.pod.workspace import Workspace
from yuan2_trainer.reporting.progress import Tracker, read_snapshot

FACTS = {"total_steps": 9, "stage": 0, "identity": {}}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    """What `checkpoint` needs of DeepSpeed's engine without ZeRO, in a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    module = torch.nn.Linear(8, 4)
    yield SimpleNamespace(module=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1))
    dist.destroy_process_group()


def judge_of(engine: Any, standing: Standing, asked: bool = False, **wanted: Any) -> Judge:
    evaluator: Any = SimpleNamespace(stepper=SimpleNamespace(engine=engine))
    pulse = Pulse(Vote(lambda: asked))
    return Judge(Evaluation(**wanted), evaluator, Course(4, 2, 3.0), pulse, standing)


def test_the_best_weights_are_put_in_place(engine: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, lambda _: None)
    checkpoints.save(engine, Position(3, 0, 3), {**FACTS, "standing": Standing(best_step=3)})
    best = engine.module.weight.detach().clone()
    with torch.no_grad():
        engine.module.weight += 1
    judge = judge_of(engine, Standing(best_step=3, best_loss=1.0, worse=2))
    assert judge.put_best_in_place(checkpoints, 5) == 3
    assert torch.equal(engine.module.weight, best)


@pytest.mark.parametrize("how", ["absent", "corrupt"])
def test_weights_that_cannot_be_read_leave_the_last_ones(
    engine: Any, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, warnings.append)
    if how == "corrupt":
        checkpoints.save(engine, Position(3, 0, 3), FACTS, overlap=False)
        shard = next((tmp_path / "checkpoints" / "step-000003").glob("shard-*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    last = engine.module.weight.detach().clone()
    judge = judge_of(engine, Standing(best_step=3, best_loss=1.0, worse=2))
    with caplog.at_level(logging.WARNING):
        assert judge.put_best_in_place(checkpoints, 5) == 5
    assert torch.equal(engine.module.weight, last)
    assert "the checkpoint of step 3, the best one, cannot be read" in caplog.text
    assert warnings == [
        "checkpoint step-000003 is skipped: "
        + ("it is not complete" if how == "absent" else f"{shard.name} does not have its checksum")
    ]


def test_without_a_better_step_the_last_weights_stay(engine: Any, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, lambda _: None)
    assert judge_of(engine, Standing()).put_best_in_place(checkpoints, 5) == 5
    assert judge_of(engine, Standing(best_step=5)).put_best_in_place(checkpoints, 5) == 5


def test_a_run_says_how_it_ended(engine: Any) -> None:
    standing = Standing(evaluated_step=6, best_step=4, best_loss=1.23456, worse=2)
    judge = judge_of(engine, standing, early_stopping_patience=2)
    assert judge.exhausted
    assert judge.words(6, 12, 4) == (
        "stopped early at step 6 of 12, after 2 evaluations without a lower loss; the evaluation loss was "
        "lowest at step 4: 1.2346; weights of step 4"
    )
    assert judge.words(12, 12, 4).startswith("12 steps done; the evaluation loss")
    assert judge_of(engine, Standing()).words(12, 12, 12) == "12 steps done; weights of step 12"


def test_what_is_pending_was_not_evaluated_yet(engine: Any) -> None:
    judge = judge_of(engine, Standing(evaluated_step=4, best_step=4), every_steps=2)
    assert not judge.pending(Position(4, 0, 4), 9)
    assert not judge.pending(Position(5, 0, 5), 9)
    assert judge.pending(Position(6, 1, 2), 9)
    assert judge.leads(Position(4, 0, 4))
    assert not judge.leads(Position(6, 1, 2))


def test_a_beat_tells_of_the_others_and_of_a_pod_that_must_end(engine: Any, tmp_path: Path) -> None:
    readings = iter([7.0, 7.5, 8.5])
    pulse = judge_of(engine, Standing()).pulse
    pulse.tracker = Tracker(Workspace(tmp_path), clock=lambda: next(readings))
    told = []
    for busy in (True, False, True):
        assert pulse.beat(busy) == busy
        told.append(read_snapshot(pulse.tracker.workspace).last_step_at)
    assert told == [7.0, 7.0, 8.5]  # not at every beat
    with pytest.raises(AskedToEndError):
        judge_of(engine, Standing(), asked=True).pulse.beat()


def test_perplexity_and_preemption_in_words() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == float("inf")
    assert "begins anew" in str(preempted_before(0))
    assert "goes on from step 3" in str(preempted_before(3))


@pytest.mark.parametrize(
    ("stage", "asked", "questions"), [(0, None, 4), (2, None, 4), (3, None, 0), (3, 2, 2), (2, 0, 0)]
)
def test_with_zero_3_a_model_answers_only_when_asked(stage: int, asked: int | None, questions: int) -> None:
    evaluation = {} if asked is None else {"sample_answers": asked}
    job = make_job(Path("/m"), Path("/d"), Path("/o"), stage=stage, eval_fraction=0.1, evaluation=evaluation)
    assert sample_answers(job) == questions
