"""Loading of exported models: ``load_model(path)`` needs torch and safetensors, but no training dependencies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError
from maestro_scale.interop.sources import ModelSource
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import check_spec


def load_model(path: str | Path) -> Maestro:
    """Load a model written by ``maestro-scale export`` or ``convert-ign``, on the CPU, in evaluation mode.

    The model contains the scaling of its inputs, and that of a finetuning its head (``predict``). ``path``: a folder,
    ``s3://bucket/prefix``, ``hf://owner/name[@revision][/folder]``, the name of a published model
    (``maestro-scale models``), or ``models:/name/version`` of an MLflow registry. Raises ExportError if there is no
    such model or its weights do not fit its configuration.
    """
    return load_source(ModelSource(path))


def load_source(source: ModelSource) -> Maestro:
    """As :func:`load_model`."""
    config, state = read_model(source)
    finetuned = _finetuned(source)
    model = Maestro(config, decodes=finetuned is None)
    model.load_state_dict(state)
    model.finetuned = finetuned
    return model.eval()


def read_model(source: ModelSource) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(configuration, weights); ExportError if either is missing or invalid, or they do not fit each other."""
    record = source.read_config()
    try:
        config = ModelConfig.from_dict(record["model"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ExportError(
            f"{source.url}/{CONFIG} describes no model that this version supports ({error}): update maestro_scale"
        ) from None
    weights = source.read_weights()
    _check_fit(f"{source.url}/{WEIGHTS}", config, weights, decodes="finetuned" not in record)
    return config, weights


def _finetuned(source: ModelSource) -> Finetuned | None:
    record = source.read_config().get("finetuned")
    if record is None:
        return None
    try:
        found = untrusted.from_builtins(Finetuned, record)
        check_spec(found.spec)
    except (TypeError, ValueError, ArithmeticError, ManifestError) as error:
        raise ExportError(f"{source.url}/{CONFIG}: finetuned: {error}; update maestro_scale") from None
    return found


def _check_fit(where: str, config: ModelConfig, weights: dict[str, Tensor], decodes: bool) -> None:
    """ExportError unless ``weights`` are those of a model of ``config``; checked before such a model has memory."""
    # Every block and sensor has tensors of its own, so a model with more of them does not fit; building it takes long.
    per_group = config.fusion in ("group", "shared")
    encoders = {s.group if per_group else s.name for s in config.all_sensors}
    if config.size.depth * len(encoders) + config.size.decoder_depth * decodes > len(weights):
        raise ExportError(
            f"{where} does not fit: {len(weights)} tensors are too few for the model of its {CONFIG}"
        )
    try:
        with torch.device("meta"):
            expected = {name: tuple(t.shape) for name, t in Maestro(config, decodes).state_dict().items()}
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        raise ExportError(f"{where}: there is no model of its {CONFIG} ({shorten(str(error))})") from None
    missing = [name for name in expected if name not in weights]
    unexpected = [shorten(name) for name in weights if name not in expected]
    if missing or unexpected:
        raise ExportError(f"{where} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ExportError(
                f"{where} does not fit: {name} has shape {tuple(weights[name].shape)}, not {shape}"
            )
