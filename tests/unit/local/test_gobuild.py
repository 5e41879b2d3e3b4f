"""A binary is kept under what it was built from."""

from __future__ import annotations

from dataclasses import replace

from yuan2_local.gobuild import CONTROL_PLANE, NODE, PROGRAMS, TESTS, Patch, program_key
from yuan2_local.paths import LOCAL

MODULES = LOCAL / "go"


def test_another_patch_or_other_manifests_make_another_binary():
    kueue = PROGRAMS["kueue"]
    assert kueue.patch is not None
    changed = (
        replace(kueue, patch=Patch(kueue.patch.file, kueue.patch.old, '"elsewhere"')),
        replace(kueue, manifests="other"),
        replace(kueue, link_flags="-X a=b"),
    )
    keys = {program_key(program, MODULES) for program in (kueue, *changed)}
    assert len(keys) == 4


def test_a_cluster_needs_no_program_of_the_tests():
    assert not {*TESTS} & {*NODE, *CONTROL_PLANE}
    assert {*TESTS, *NODE} == {*PROGRAMS}
    assert {program.module for program in PROGRAMS.values()} == {
        folder.name for folder in MODULES.iterdir() if folder.is_dir()
    }
