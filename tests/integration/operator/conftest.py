"""The control plane that these tests share, one operator on it, and a node that is played."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kubelet import FakeNode
from tests.support.operator_process import Operator, service_account_kubeconfig


@pytest.fixture(scope="session")
def node(control_plane: Any) -> Iterator[FakeNode]:
    """A node whose kubelet is the test."""
    with FakeNode(control_plane.client).up() as made:
        yield made


@pytest.fixture(scope="session")
def operator(control_plane: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The operator with the rights of its service account; tests may kill and start it."""
    directory: Path = tmp_path_factory.mktemp("operator")
    kubeconfig = service_account_kubeconfig(control_plane, directory)
    with Operator(kubeconfig, directory / "operator.log").running() as made:
        yield made
        lines = made.text().splitlines()
    assert not [line for line in lines if "Traceback" in line], "\n".join(lines[-60:])
