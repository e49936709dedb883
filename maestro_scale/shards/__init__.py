"""Dataset storage: samples as safetensors in tar shards, a manifest, and a store that verifies shards before use.

To write your own dataset: ``from maestro_scale.shards import Raster, Target, Writer, describe``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maestro_scale.datasets.spec import Target
    from maestro_scale.shards.format.manifest import Manifest
    from maestro_scale.shards.read.as_webdataset import as_webdataset
    from maestro_scale.shards.write.from_arrays import Raster, describe
    from maestro_scale.shards.write.writer import Writer, write_shards

__all__ = ["Manifest", "Raster", "Target", "Writer", "as_webdataset", "describe", "write_shards"]
_MODULES = {
    "Manifest": "maestro_scale.shards.format.manifest",
    "Raster": "maestro_scale.shards.write.from_arrays",
    "Target": "maestro_scale.datasets.spec",
    "Writer": "maestro_scale.shards.write.writer",
    "as_webdataset": "maestro_scale.shards.read.as_webdataset",
    "describe": "maestro_scale.shards.write.from_arrays",
    "write_shards": "maestro_scale.shards.write.writer",
}


def __getattr__(name: str) -> Any:
    # Imported on first access: load_model needs only shards.storage, and torch alone must be enough to load a model.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
