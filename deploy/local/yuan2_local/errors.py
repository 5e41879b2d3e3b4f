"""The one exception a user of the local cluster sees."""

from __future__ import annotations


class ClusterError(Exception):
    """Something the user can act on: one line that names the thing and the way out."""
