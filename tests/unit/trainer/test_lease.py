"""An output belongs to one attempt at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import make_job
from yuan2_core.contract import TrainJob
from yuan2_trainer.pod.lease import LEASE, SupersededError, require_lease, take_lease


def job(output: Path, attempt: int, uid: str = "uid") -> TrainJob:
    made = make_job(Path("/m"), Path("/d"), output)
    return made.model_copy(update={"attempt": attempt, "uid": uid})


def test_a_later_attempt_takes_the_output_and_the_earlier_one_cannot_take_it_back(tmp_path: Path) -> None:
    first, second = job(tmp_path, 1), job(tmp_path, 2)
    take_lease(first)
    require_lease(first)
    take_lease(second)
    take_lease(second)  # its second pod
    require_lease(second)
    for act in (require_lease, take_lease):
        with pytest.raises(
            SupersededError, match=r"belongs to attempt 2 of test/tiny now, so that attempt 1"
        ):
            act(first)
    assert [item.name for item in tmp_path.iterdir()] == [LEASE]


def test_another_run_takes_the_output_and_the_first_one_is_told(tmp_path: Path) -> None:
    """Of two runs with one output the later one writes."""
    take_lease(job(tmp_path, 3, "a"))
    take_lease(job(tmp_path, 1, "b"))
    with pytest.raises(SupersededError, match="give one of the two another output path"):
        require_lease(job(tmp_path, 3, "a"))


@pytest.mark.parametrize("content", [None, "", "{}", "half a li"])
def test_without_a_readable_lease_nobody_is_in_the_way(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / LEASE).write_text(content)
    require_lease(job(tmp_path, 1))
    take_lease(job(tmp_path, 1))
    require_lease(job(tmp_path, 1))
