"""Folders that hold packages are not packages themselves: `operator` would shadow the standard library's."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("folder", ["core", "operator", "trainer_image", "server_image"])
def test_a_folder_of_packages_is_not_a_package(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_standard_library_keeps_its_operator():
    assert operator.add(1, 1) == 2
    assert ROOT not in Path(operator.__file__ or "").parents
