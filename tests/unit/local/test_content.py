"""Content keys change exactly when their inputs do."""

from __future__ import annotations

from pathlib import Path

import pytest

from yuan2_local.content import content_key, files_below


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a = 1\n")
    (tmp_path / "package" / "b.py").write_text("b = 2\n")
    return tmp_path


def key(tree: Path, **facts: str) -> str:
    return content_key([tree / "package"], tree, facts)


def test_the_same_tree_elsewhere_has_the_same_key(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "package").mkdir()
    for file in sorted((tree / "package").iterdir(), reverse=True):
        (other / "package" / file.name).write_bytes(file.read_bytes())
    assert key(tree) == key(other)


def test_a_changed_byte_changes_the_key(tree: Path) -> None:
    before = key(tree)
    (tree / "package" / "b.py").write_text("b = 3\n")
    assert key(tree) != before


def test_a_renamed_file_changes_the_key(tree: Path) -> None:
    before = key(tree)
    (tree / "package" / "b.py").rename(tree / "package" / "c.py")
    assert key(tree) != before


def test_an_executable_bit_changes_the_key(tree: Path) -> None:
    before = key(tree)
    (tree / "package" / "b.py").chmod(0o755)
    assert key(tree) != before


def test_a_fact_changes_the_key(tree: Path) -> None:
    assert key(tree, base="one") != key(tree, base="two")


def test_caches_of_tools_do_not_count(tree: Path) -> None:
    before = key(tree)
    (tree / "package" / "__pycache__").mkdir()
    (tree / "package" / "__pycache__" / "a.pyc").write_bytes(b"\0")
    assert key(tree) == before


def test_a_missing_input_is_an_error(tree: Path) -> None:
    with pytest.raises(FileNotFoundError):
        content_key([tree / "absent"], tree, {})


def test_files_come_in_a_stable_order(tree: Path) -> None:
    assert [path.name for path in files_below(tree)] == ["a.py", "b.py"]
