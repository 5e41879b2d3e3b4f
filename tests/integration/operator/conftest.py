"""The control plane that these tests share."""

from tests.support.cluster import control_plane

__all__ = ["control_plane"]
