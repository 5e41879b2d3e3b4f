"""The stored manifests of tests/golden, which our own code wrote, before a real API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

FILES = sorted((Path(__file__).parents[2] / "golden" / "manifests").glob("*.out*.yaml"))
NAMESPACE = "golden"


@pytest.fixture(scope="module")
def cluster(control_plane: Any) -> Any:
    control_plane.kubectl("create", "namespace", NAMESPACE)
    return control_plane


def differences(made: Any, sent: Any, place: str = "") -> Iterator[str]:
    """What was sent and is not there; the API server adds defaults."""
    if isinstance(sent, dict) and isinstance(made, dict):
        for key in sent:
            yield from differences(made.get(key), sent[key], f"{place}.{key}")
    elif isinstance(sent, list) and isinstance(made, list) and len(made) == len(sent):
        for number, (left, right) in enumerate(zip(made, sent, strict=True)):
            yield from differences(left, right, f"{place}[{number}]")
    elif made != sent and (made, sent) != (None, ""):  # an empty value is left out
        yield f"{place}: {made!r} instead of {sent!r}"


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_the_api_server_takes_every_field(path: Path, cluster: Any) -> None:
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        manifest["metadata"]["namespace"] = NAMESPACE
        words = ("create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-")
        made = json.loads(cluster.kubectl(*words, input=json.dumps(manifest)))
        assert list(differences(made, manifest, manifest["kind"])) == []
