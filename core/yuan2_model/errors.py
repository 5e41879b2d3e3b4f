"""What a user can get wrong about a model directory."""

from __future__ import annotations

from yuan2_core.errors import ModelError


class ModelFilesError(ModelError):
    """A model directory that cannot be loaded: names the file, the field or tensor, and the way out."""
