"""maestro_scale pretrains MAESTRO, a masked autoencoder for Earth observation, on clusters, and scores it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `maestro-scale --help` and the recipe do not import torch.
    if name == "load_model":
        return importlib.import_module("maestro_scale.interop.pretrained").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
