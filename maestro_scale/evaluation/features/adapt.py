"""Adapt a pretrained encoder to a dataset that it was not trained on."""

from __future__ import annotations

import dataclasses

from maestro_scale.datasets.spec import Sensor
from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.config import DatasetView, ModelConfig, conflicts
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sequences import sequences


def adapt_encoder(model: Maestro, view: DatasetView, trains: bool = False) -> tuple[Maestro, list[str]]:
    """(a model with the encoder of ``model`` for a dataset as in ``view``, notes for the user).

    Weights are matched by name: patch embeddings by a sensor's ``embed``, encoders by its ``group``. A sensor without
    either is left out or, where the encoder ``trains`` on the dataset, re-initialised; the notes say which. The
    decoder is always new, as nothing is reconstructed. ResultsError where no sensor has weights, or where a shared
    patch embedding would get another patch size or number of bands.
    """
    config = model.config
    if any(v.dataset == view.dataset and v.sensors == view.sensors for v in config.views):
        return model, []
    reasons = {s.name: reason for s in view.sensors if (reason := _missing_weights(model, s)) is not None}
    fate = "is re-initialised" if trains else "is left out"
    notes = [f"{name} {fate}: {reason}" for name, reason in reasons.items()]
    sensors = tuple(s for s in view.sensors if s.name not in reasons)
    if not sensors:
        raise ResultsError(
            f"{view.dataset}: the checkpoint has weights for none of its sensors: " + "; ".join(notes)
        )
    in_use = view.sensors if trains else sensors
    view = dataclasses.replace(view, sensors=in_use)
    if problems := conflicts([*config.views, view]):
        raise ResultsError(f"the checkpoint does not fit: {problems[0]}")
    # vars(): the fields of a view are also fields of a model's configuration.
    adapted = Maestro(dataclasses.replace(config, **vars(view), others=(), heads=())).initialise(0)
    pretrained = model.state_dict()
    for name, tensor in adapted.state_dict().items():
        if name in pretrained and pretrained[name].shape == tensor.shape:
            tensor.copy_(pretrained[name])
    return adapted.eval(), [*notes, f"{view.dataset} is encoded from {', '.join(s.name for s in in_use)}"]


def _missing_weights(model: Maestro, sensor: Sensor) -> str | None:
    """Which weights the model lacks for a sensor; None if it has them all."""
    if sensor.embed not in model.patch_embed:
        return f"the checkpoint has no embedding {sensor.embed!r} (it has: {', '.join(model.patch_embed)})"
    encoder = _encoder_name(model.config, sensor)
    if encoder not in model.encoders:
        return f"the checkpoint has no encoder {encoder!r} (it has: {', '.join(model.encoders)})"
    return None


def _encoder_name(config: ModelConfig, sensor: Sensor) -> str:
    """Name of the encoder for a sensor's sequence: asked of a configuration with that sensor alone, since the name
    depends on the fusion mode."""
    alone = dataclasses.replace(
        config.views[0].sensors[0], name=sensor.name, group=sensor.group, embed=sensor.name
    )
    (sequence,) = sequences(dataclasses.replace(config, sensors=(alone,), others=()))
    return sequence.encoder
