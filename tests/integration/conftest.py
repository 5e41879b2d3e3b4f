"""Clusters for the tests below, and what of them may run at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cluster import control_plane, node_cluster

__all__ = ["control_plane", "node_cluster"]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a folder in one process: its tests share a control plane, an operator or a service."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(here).parts[0]))
