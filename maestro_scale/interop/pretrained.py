"""Exported models back in: ``load_model(path)`` needs torch and safetensors, nothing of the training stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from maestro_scale.interop.export import CONFIG, FORMAT_VERSION, WEIGHTS, ExportError
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro


def read_record(folder: Path) -> dict[str, Any]:
    """The content of an exported model's config.json; ExportError where there is none that this version reads."""
    try:
        record = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder} is no exported model ({error}); make one with `maestro-scale export`"
        ) from None
    if record.get("format_version") != FORMAT_VERSION:
        raise ExportError(
            f"{folder / CONFIG} has format {record.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return record


def load_model(path: str | Path) -> Maestro:
    """A model exported by ``maestro-scale export``, on the CPU, in evaluation mode, its input scaling inside.

    Raises ExportError where the folder is not such a model or its weights do not fit its configuration.
    """
    folder = Path(path)
    record = read_record(folder)
    model = Maestro(ModelConfig.from_dict(record["model"]))
    missing, unexpected = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    if missing or unexpected:
        raise ExportError(
            f"{folder / WEIGHTS} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()
