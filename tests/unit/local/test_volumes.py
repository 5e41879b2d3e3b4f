"""Claims, sizes and what the provisioner decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from yuan2_local.errors import ClusterError
from yuan2_local.objects import PROVISIONER, STORAGE_CLASS
from yuan2_local.paths import State
from yuan2_local.provisioner import Claim, claims_to_serve, volumes_to_remove
from yuan2_local.volumes import (
    directory,
    make_directory,
    parse_claim,
    parse_size,
    persistent_volume,
    remove_directory,
    volume_name,
)


def claim(name: str = "models", **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "metadata": {"namespace": "demo", "name": name, "uid": f"uid-{name}"},
        "spec": {"storageClassName": STORAGE_CLASS, "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": "Pending"},
    }
    for section, values in changes.items():
        made[section] = {**made[section], **values}
    return made


def test_a_pending_claim_of_our_class_is_served_once() -> None:
    assert claims_to_serve([claim()], []) == [Claim("demo", "models", "uid-models", "1Gi")]
    assert claims_to_serve([claim()], [volume_name("demo", "models")]) == []


@pytest.mark.parametrize(
    "other",
    [
        claim(spec={"storageClassName": "fast"}),
        claim(spec={"storageClassName": ""}),
        claim(spec={"volumeName": "chosen"}),
        claim(status={"phase": "Bound"}),
        claim(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
    ],
)
def test_other_claims_are_left_alone(other: dict[str, Any]) -> None:
    assert claims_to_serve([other], []) == []


def test_a_released_volume_of_ours_is_removed_and_no_other() -> None:
    def volume(phase: str, by: str = PROVISIONER) -> dict[str, Any]:
        made = persistent_volume(Path("/volumes/demo/models"), "demo", "models", "1Gi")
        made["metadata"]["annotations"]["pv.kubernetes.io/provisioned-by"] = by
        return {**made, "status": {"phase": phase}}

    kept = [volume("Bound"), volume("Available"), volume("Released", "someone.else")]
    assert volumes_to_remove(kept) == []
    assert volumes_to_remove([volume("Released")]) == [("local-demo-models", Path("/volumes/demo/models"))]


def test_a_volume_is_reserved_for_its_claim_in_every_access_mode() -> None:
    spec = persistent_volume(Path("/v"), "demo", "models", "1Gi", uid="7")["spec"]
    assert spec["claimRef"]["uid"] == "7"
    assert {"ReadWriteOnce", "ReadWriteMany"} <= set(spec["accessModes"])
    assert "uid" not in persistent_volume(Path("/v"), "demo", "models", "1Gi")["spec"]["claimRef"]


@pytest.mark.parametrize(("text", "size"), [("512Mi", 512 * 2**20), ("2Gi", 2**31), ("1.5k", 1500), ("7", 7)])
def test_sizes_are_quantities(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2 Gi", "-1Gi", "2GB", "Gi"])
def test_a_size_that_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ClusterError, match="2Gi"):
        parse_size(text)


@pytest.mark.parametrize("text", ["models", "a/b/c", "demo/", "/models", "Demo/models", "../models"])
def test_a_claim_that_is_not_namespace_and_name_is_refused(text: str) -> None:
    with pytest.raises(ClusterError, match="NAMESPACE/CLAIM"):
        parse_claim(text)


def test_directories_can_be_written_by_everyone_and_removed_only_below_volumes(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    path = directory(state, "demo", "models")
    make_directory(path)
    assert path.stat().st_mode & 0o777 == 0o777
    (path / "file").write_text("x")
    remove_directory(state, path)
    assert not path.exists()
    with pytest.raises(ClusterError, match="not below"):
        remove_directory(state, tmp_path)
