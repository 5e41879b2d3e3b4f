"""An output that the pod's user may not write is told with who may."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from yuan2_trainer.pod.outcome import JobError
from yuan2_trainer.pod.preflight import check_writable

OTHER = 4711


@pytest.fixture
def claim() -> Iterator[Path]:
    """A directory that only its owner may write, seen by another user than root, whom nothing stops."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o555)
        before = os.geteuid()
        if before == 0:
            os.chown(place, 1234, 1234)
            os.seteuid(OTHER)
        try:
            yield place
        finally:
            os.seteuid(before)
            place.chmod(0o755)


@pytest.mark.parametrize("name", [".", "tuned", "a/b/c"])
def test_the_sentence_says_which_user_needs_what(claim, name):
    with pytest.raises(JobError) as caught:
        check_writable(claim / name)
    text, owner = str(caught.value), claim.stat()
    assert f"the pod runs as uid {os.geteuid()} with groups" in text
    assert f"{claim} belongs to uid {owner.st_uid}, gid {owner.st_gid} with mode 555" in text
    assert f"chown {os.geteuid()} {claim}" in text
    assert f"{{runAsUser: {owner.st_uid}, runAsGroup: {owner.st_gid}}}" in text
    assert "\n" not in text


def test_nobody_is_told_to_run_as_root(claim):
    if os.geteuid() != OTHER:
        with pytest.raises(JobError):
            check_writable(claim)
        return
    os.seteuid(0)
    os.chown(claim, 0, 0)
    os.seteuid(OTHER)
    with pytest.raises(JobError) as caught:
        check_writable(claim)
    assert "runAsUser" not in str(caught.value)
    assert "belongs to uid 0" in str(caught.value)
