"""From exceptions and exit codes to the pod's exit code and its last word."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_core.contract import PEER_LOST, TERMINATION_LIMIT, Progress, Termination, TrainJob
from yuan2_core.errors import DatasetError
from yuan2_trainer.pod.outcome import (
    JobError,
    Outcome,
    OutputFullError,
    PreemptedError,
    combine,
    outcome_of,
    termination_text,
    write_termination,
)

COMPLETE = Outcome(0, "Complete", "done")
PREEMPTED = Outcome(75, "Preempted", "saved")
CRASHED = Outcome(1, "Crashed", "KeyError: x", at=5.0)
LOST = Outcome(1, PEER_LOST, "lost contact", at=1.0)
INVALID = Outcome(78, "InvalidModel", "a tensor is missing", at=9.0)


@pytest.mark.parametrize(
    ("error", "code", "reason", "text"),
    [
        (DatasetError("d.json, record 3, output: empty"), 78, "InvalidData", "record 3"),
        (JobError("output: x"), 78, "InvalidJob", "output"),
        (OutputFullError("output: full"), 78, "OutputFull", "full"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 78, "OutputFull", "/out/x"),
        (RuntimeError("IoError(Os { code: 28, kind: StorageFull })"), 78, "OutputFull", "no space left"),
        (PreemptedError("at step 3"), 75, "Preempted", "step 3"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "Crashed", "microBatchSize"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory"),
            1,
            "Crashed",
            "out of memory",
        ),
        (RuntimeError("[gloo/x.cc:1] Connection closed by peer"), 1, "PeerLost", "another rank"),
        (RuntimeError("ncclRemoteError: A call failed possibly due to"), 1, "PeerLost", "another rank"),
        (
            RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed."),
            1,
            "PeerLost",
            "0 bytes",
        ),
        (KeyError("weight"), 1, "Crashed", "KeyError: 'weight'"),
        (ZeroDivisionError(), 1, "Crashed", "ZeroDivisionError"),
    ],
)
def test_errors_are_told_apart(error: Exception, code: int, reason: str, text: str) -> None:
    outcome = outcome_of(error)
    assert (outcome.exit_code, outcome.reason) == (code, reason)
    assert text in outcome.message
    assert "\n" not in outcome.message


def test_pydantics_errors_name_the_field_as_in_the_json() -> None:
    from yuan2_trainer.pod.launcher import load_job

    with pytest.raises(JobError, match="No such file"):
        load_job(Path("/nowhere/job.json"))


def test_a_wrong_job_names_all_its_fields(tmp_path: Path) -> None:
    from yuan2_trainer.pod.launcher import load_job

    path = tmp_path / "job.json"
    path.write_text(json.dumps({"name": "a", "training": {"learningRate": -1}}))
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert "training.learningRate: " in str(caught.value)
    assert "output: " in str(caught.value)
    assert set(TrainJob.model_fields) >= {"output"}


@pytest.mark.parametrize(
    ("outcomes", "codes", "expected"),
    [
        ({0: COMPLETE, 1: COMPLETE}, {}, COMPLETE),
        ({0: PREEMPTED, 1: PREEMPTED}, {0: 75, 1: 75}, PREEMPTED),
        ({0: PREEMPTED}, {0: 75, 1: -15}, PREEMPTED),
        ({0: LOST, 1: CRASHED}, {0: 1, 1: 1}, CRASHED),
        ({0: LOST, 1: CRASHED, 2: INVALID}, {0: 1}, INVALID),
        ({0: COMPLETE, 1: CRASHED}, {1: 1}, CRASHED),
        ({0: CRASHED}, {0: 1, 1: -15}, CRASHED),
        ({0: LOST}, {0: 1, 1: -15}, LOST),
    ],
)
def test_the_cause_wins_over_its_consequences(
    outcomes: dict[int, Outcome], codes: dict[int, int], expected: Outcome
) -> None:
    assert combine(outcomes, codes, range(2)) == expected


@pytest.mark.parametrize("others", [{}, {0: LOST}, {0: CRASHED}])
def test_a_rank_killed_without_a_word_is_the_cause(others: dict[int, Outcome]) -> None:
    outcome = combine(others, {1: -9}, range(2))
    assert outcome.exit_code == 1
    assert "rank 1 was ended by signal 9" in outcome.message
    assert "memory" in outcome.message


def test_an_end_without_any_word_is_a_crash() -> None:
    assert combine({}, {}, range(2)).exit_code == 1
    assert combine({0: COMPLETE}, {}, range(2)).exit_code == 1
    assert "exit code 3" in combine({}, {0: 3}, range(1)).message


outcomes = st.sampled_from([COMPLETE, PREEMPTED, CRASHED, LOST, INVALID])


@given(
    st.dictionaries(st.integers(0, 3), outcomes),
    st.dictionaries(st.integers(0, 3), st.sampled_from([1, -9, -15])),
)
def test_success_needs_every_rank(said: dict[int, Outcome], codes: dict[int, int]) -> None:
    combined = combine(said, codes, range(4))
    whole = all(said.get(rank) == COMPLETE for rank in range(4))
    assert (combined.exit_code == 0) == whole
    if INVALID in said.values():
        assert combined.exit_code == 78


@given(st.text(max_size=9000), st.booleans())
def test_the_termination_message_fits_and_parses(message: str, with_progress: bool) -> None:
    progress = Progress(name="n" * 60, attempt=1, state="failed") if with_progress else None
    text = termination_text(Outcome(1, "Crashed", message), progress)
    assert len(text.encode()) <= TERMINATION_LIMIT
    assert Termination.model_validate_json(text).reason == "Crashed"


def test_a_termination_log_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    write_termination(tmp_path / "missing" / "log", CRASHED, None)
    write_termination(tmp_path / "log", CRASHED, None)
    assert json.loads((tmp_path / "log").read_text()) == {"reason": "Crashed", "message": "KeyError: x"}
