"""Clusters for the tests below."""

from __future__ import annotations

from tests.support.cluster import control_plane, node_cluster

__all__ = ["control_plane", "node_cluster"]
