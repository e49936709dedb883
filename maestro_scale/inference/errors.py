"""The error of this package."""

from __future__ import annotations

from maestro_scale.errors import MaestroError


class InferenceError(MaestroError):
    """A model cannot predict these data, or a folder of predictions cannot be used; the message says what to change."""
