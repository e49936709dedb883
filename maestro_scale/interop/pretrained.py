"""Loading of exported models: ``load_model(path)`` needs torch and safetensors, but no training dependencies."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError
from maestro_scale.interop.sources import ModelSource
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro


def load_model(path: str | Path) -> Maestro:
    """Load a model written by ``maestro-scale export`` or ``convert-ign``, on the CPU, in evaluation mode.

    The model contains the scaling of its inputs. ``path``: a folder, ``s3://bucket/prefix``,
    ``hf://owner/name[@revision][/folder]``, or ``models:/name/version`` of an MLflow registry. Raises ExportError if
    there is no such model or its weights do not fit its configuration.
    """
    source = ModelSource(path)
    config, state = read_model(source)
    model = Maestro(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ExportError(
            f"{source.url}/{WEIGHTS} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()


def read_model(source: ModelSource) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(configuration, weights); ExportError if either is missing or invalid."""
    record = source.read_config()
    try:
        config = ModelConfig.from_dict(record["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{source.url}/{CONFIG} describes no model that this version supports ({error}): update maestro_scale"
        ) from None
    return config, source.read_weights()
