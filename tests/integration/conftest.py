"""Clusters for the tests below, and what of them may run at the same time."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support.cluster import control_plane, node_cluster

__all__ = ["control_plane", "node_cluster"]


class FolderScheduling(LoadScopeScheduling):
    """Keeps a folder in one process: its tests share a control plane, an operator or a service."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0].rpartition("/")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FolderScheduling:
    """Not `--dist loadgroup`, whose marks xdist 3.8 writes where pytest 9.2 does not read them."""
    return FolderScheduling(config, log)
