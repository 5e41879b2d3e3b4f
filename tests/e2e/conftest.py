"""The node with the operator on it, once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.support.cluster import TestCluster, node_cluster
from tests.support.journey import install_operator
from yuan2_local.command import exclusive

__all__ = ["node_cluster", "operated"]


@pytest.fixture(scope="session")
def operated(node_cluster: TestCluster) -> TestCluster:
    """The cluster with the operator of this tree as a Deployment."""
    with exclusive(node_cluster.cache.locks / "operator-install.lock"):
        install_operator(node_cluster)
    return node_cluster
