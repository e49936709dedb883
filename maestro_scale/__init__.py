"""maestro_scale pretrains MAESTRO, a masked autoencoder for Earth observation, on clusters, and scores it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["backbone", "load_model", "tile"]

_MODULES = {
    "backbone": "maestro_scale.interop.backbone",
    "load_model": "maestro_scale.interop.pretrained",
    "tile": "maestro_scale.shards.write.from_arrays",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `maestro-scale --help` and the recipe do not import torch.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
