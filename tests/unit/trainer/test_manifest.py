"""Which checkpoint a run goes on from, and which ones are deleted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuan2_trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ShardFile,
    checkpoint_name,
    complete_checkpoints,
    read_manifest,
    remove_checkpoint,
    remove_partials,
    step_of,
    surplus,
    verify_file,
)
from yuan2_trainer.evaluation.standing import Standing

CONTENT = b"numbers"


def write_checkpoint(
    root: Path,
    step: int,
    fragments: dict[str, tuple[int, int]] | None = None,
    standing: Standing | None = None,
    lasting: bool = True,
) -> Path:
    directory = root / checkpoint_name(step)
    directory.mkdir(parents=True)
    (directory / "shard").write_bytes(CONTENT)
    file = ShardFile(
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        fragments={"w": (0, 6)} if fragments is None else fragments,
    )
    manifest = Manifest(
        step=step,
        epoch=0,
        offset=step,
        total_steps=9,
        world_size=1,
        stage=2,
        identity={},
        standing=standing,
        lasting=lasting,
        shapes={"w": [2, 3]},
        files={"shard": file},
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    return directory


def damage(directory: Path, how: str) -> None:
    if how == "no manifest":
        (directory / MANIFEST).unlink()
    elif how == "half a manifest":
        (directory / MANIFEST).write_text((directory / MANIFEST).read_text()[:40])
    elif how == "no file":
        (directory / "shard").unlink()
    else:
        (directory / "shard").write_bytes(CONTENT[:3])


DAMAGES = ["no manifest", "half a manifest", "no file", "short file"]


def test_the_newest_complete_checkpoint_comes_first(tmp_path: Path) -> None:
    for step in (2, 10, 1_000_000, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step-000011.partial").mkdir()
    (tmp_path / "notes").mkdir()
    found = list(complete_checkpoints(tmp_path, pytest.fail))
    assert [item.manifest.step for item in found] == [1_000_000, 10, 4, 2]
    assert found[0].manifest.position.offset == 1_000_000


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, how: str) -> None:
    write_checkpoint(tmp_path, 2)
    damage(write_checkpoint(tmp_path, 4), how)
    warnings: list[str] = []
    assert [item.manifest.step for item in complete_checkpoints(tmp_path, warnings.append)] == [2]
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint step-000004 is skipped: ")


@given(st.lists(st.booleans(), max_size=8), st.integers(1, 4))
def test_surplus_never_takes_one_of_the_newest_complete_ones(
    tmp_path_factory: pytest.TempPathFactory, good: list[bool], keep: int
) -> None:
    root = tmp_path_factory.mktemp("checkpoints")
    for step, whole in enumerate(good):
        directory = write_checkpoint(root, step)
        if not whole:
            damage(directory, DAMAGES[step % 4])
    complete = [step for step, whole in enumerate(good) if whole]
    removed = {step_of(directory) for directory in surplus(root, keep)}
    assert removed == set(complete[:-keep])


@given(
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True),
    keep=st.integers(1, 4),
    data=st.data(),
)
def test_surplus_never_takes_the_best_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, data: st.DataObject
) -> None:
    """Each checkpoint knows which one was best when it was written."""
    root = tmp_path_factory.mktemp("checkpoints")
    best: int | None = None
    for step in sorted(steps):
        best = data.draw(st.sampled_from([best, step]))
        write_checkpoint(root, step, standing=Standing(best_step=best))
        for directory in surplus(root, keep):
            remove_checkpoint(directory)
        left = {step_of(item) for item in root.iterdir()}
        newest = set(sorted(done for done in steps if done <= step)[-keep:])
        assert newest <= left
        assert best is None or best in left
        assert len(left) <= 2 * keep + 1


def test_of_checkpoints_that_do_not_last_only_the_newest_is_kept(tmp_path: Path) -> None:
    """They do not push out lasting ones, either."""
    left = []
    for step, lasting in ((1, True), (2, False), (3, False), (4, True), (5, False), (6, True), (7, False)):
        write_checkpoint(tmp_path, step, lasting=lasting)
        for directory in surplus(tmp_path, 2):
            remove_checkpoint(directory)
        left.append(sorted(step_of(item) or 0 for item in tmp_path.iterdir()))
    assert left == [[1], [1, 2], [1, 3], [1, 4], [1, 4, 5], [4, 6], [4, 6, 7]]


def test_what_lost_its_checksum_pushes_out_nothing_and_goes_when_it_is_older(tmp_path: Path) -> None:
    good, older, damaged = (write_checkpoint(tmp_path, step) for step in (3, 2, 4))
    assert surplus(tmp_path, 1, {damaged}) == [older]
    newer = write_checkpoint(tmp_path, 5)
    assert surplus(tmp_path, 2, {damaged}) == [older, damaged]
    assert surplus(tmp_path, 1, {damaged}) == [good, older, damaged]
    assert newer.is_dir()


@pytest.mark.parametrize(
    "fragments", [{}, {"w": (0, 5)}, {"w": (1, 5)}, {"w": (0, 6), "x": (0, 1)}, {"w": (0, 7)}]
)
def test_a_parameter_that_is_not_stored_whole_is_an_error(
    tmp_path: Path, fragments: dict[str, tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match="is not stored whole"):
        read_manifest(write_checkpoint(tmp_path, 1, fragments))


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1)
    file = read_manifest(directory).files["shard"]
    assert verify_file(directory, "shard", file) is None
    (directory / "shard").write_bytes(CONTENT[:-1] + b"!")
    assert verify_file(directory, "shard", file) == "shard does not have its checksum"


def test_removal_takes_the_whole_directory_and_leftovers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 1)
    (tmp_path / "step-000002.partial").mkdir()
    remove_partials(tmp_path)
    remove_checkpoint(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["step-", "step-1a", "step-000001.partial", "xstep-1", "step--1", "step-²"])
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert step_of(Path(name)) is None
