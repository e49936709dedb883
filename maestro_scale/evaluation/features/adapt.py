"""Adapt a pretrained encoder to a dataset, and the spec of a dataset to the sensors that an encoder reads."""

from __future__ import annotations

import dataclasses

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.datasets.spec_check import (
    SHARING_ADVICE,
    crop_problems,
    sharing_problems,
    source_problems,
)
from maestro_scale.errors import dotted
from maestro_scale.evaluation.baselines.baseline import FrozenEncoder
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sequences import sequences


def adapt_encoder(model: Maestro, spec: DatasetSpec, trains: bool = False) -> tuple[Maestro, list[str]]:
    """(a model with the encoder of ``model`` for the dataset of a resolved ``spec``, notes for the user).

    Weights are matched by name: patch embeddings by a sensor's ``embed``, encoders by its ``group``. A sensor without
    either is left out or, where the encoder ``trains`` on the dataset, re-initialised; the notes say which. The
    decoder is always new, as nothing is reconstructed. EvaluationError where no sensor has weights, or where a shared
    patch embedding would get another patch size or number of bands.
    """
    config, view = model.config, _with_token_groups(model.config, DatasetView.of_spec(spec))
    if any(v.dataset == view.dataset and v.sensors == view.sensors for v in config.views):
        return model, []
    reasons = {s.name: reason for s in view.sensors if (reason := _missing_weights(model, s)) is not None}
    fate = "is re-initialised" if trains else "is left out"
    notes = [f"{name} {fate}: {reason}" for name, reason in reasons.items()]
    sensors = tuple(s for s in view.sensors if s.name not in reasons)
    if not sensors:
        raise EvaluationError(
            f"{view.dataset}: the checkpoint has weights for none of its sensors: " + "; ".join(notes)
        )
    in_use = view.sensors if trains else sensors
    view = dataclasses.replace(view, sensors=in_use)
    for path, reason in sharing_problems([(v.dataset, v.sensors) for v in (*config.views, view)]):
        name = path[2] if len(path) > 2 else view.dataset
        raise EvaluationError(
            f"the checkpoint does not fit {view.dataset}: {dotted(path)}: {reason.removesuffix(SHARING_ADVICE)}; "
            "evaluate with a recipe that gives the sensor the checkpoint's patch and bands "
            f"(data.mixture[0].sensors.{name}, as recipes/cross/ do), or leaves it out "
            f"(data.mixture[0].sensors.{name}=null)"
        )
    # vars(): the fields of a view are also fields of a model's configuration.
    adapted = Maestro(dataclasses.replace(config, **vars(view), others=(), heads=())).initialise(0)
    pretrained = model.state_dict()
    for name, tensor in adapted.state_dict().items():
        if name in pretrained and pretrained[name].shape == tensor.shape:
            tensor.copy_(pretrained[name])
    return adapted.eval(), [*notes, f"{view.dataset} is encoded from {', '.join(s.name for s in in_use)}"]


def _with_token_groups(config: ModelConfig, view: DatasetView) -> DatasetView:
    """The view with the token groups of the model, by ``embed``, for sensors whose spec has none."""
    groups = {s.embed: (len(s.bands), s.token_groups) for s in config.all_sensors}
    sensors = []
    for s in view.sensors:
        num_bands, theirs = groups.get(s.embed, (0, ()))
        fits = config.spectral == "token" and not s.token_groups and num_bands == len(s.bands)
        sensors.append(dataclasses.replace(s, token_groups=theirs) if fits else s)
    return dataclasses.replace(view, sensors=tuple(sensors))


def encoder_spec(encoder: FrozenEncoder, spec: DatasetSpec) -> DatasetSpec:
    """A resolved ``spec`` with the sensors that ``encoder`` reads, which may be fewer.

    EvaluationError where the dataset does not store them, or the crop does not fit the pixels of those that are left.
    """
    view = encoder.view(spec.name)
    adapted = dataclasses.replace(spec, sensors=view.sensors, ref_sensor=view.ref_sensor)
    for sensor in adapted.sensors:
        for path, reason in source_problems(sensor, adapted.modalities):
            raise EvaluationError(f"{dotted((spec.name, 'sensors', sensor.name, *path))}: {reason}")
    for path, reason in crop_problems(adapted):
        raise EvaluationError(f"{dotted((spec.name, *path))}: {reason}")
    return adapted


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
