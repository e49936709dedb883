"""Resolves what a recipe says of its datasets: the spec of each dataset as the run uses it, and the model for them.

``resolve_spec`` is the only place where the spec of a manifest meets an entry of the mixture. Everything behind it
(stream, model, plan, evaluation) reads sensors, crop and reference sensor from the spec that it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.datasets.spec_check import (
    Problem,
    sharing_problems,
    target_group_problems,
    view_problems,
)
from maestro_scale.errors import KeyPath, did_you_mean, dotted
from maestro_scale.model.config import DatasetView, ModelConfig, Spectral
from maestro_scale.model.masking import MaskingConfig
from maestro_scale.recipe.data import MixtureEntry, SensorOverride
from maestro_scale.recipe.errors import RecipeError
from maestro_scale.recipe.schema import Recipe
from maestro_scale.stream.source import mixture_names


def resolve_spec(
    spec: DatasetSpec, entry: MixtureEntry, number: int = 0, spectral: Spectral = "joint"
) -> DatasetSpec:
    """``spec``, as a manifest or a shipped dataset has it, with the sensors and the crop that ``entry`` asks for.

    ``number``: of the entry in ``data.mixture``, for messages. ``spectral``: of the model that is built for the spec;
    with ``token``, sensors without token groups get one token per band group.

    Raises:
        RecipeError: another dataset, a sensor that the dataset does not have, or changes that do not fit the data or
            each other; one line per mistake.
    """
    where = ("data", "mixture", number)
    if spec.name != entry.dataset:
        raise RecipeError(
            f"{dotted((*where, 'dataset'))}: {entry.dataset!r}, but {entry.shards} holds {spec.name!r}: set "
            f"{dotted((*where, 'shards'))} to shards of {entry.dataset}, or use a recipe of {spec.name}"
        )
    resolved = dataclasses.replace(
        spec,
        sensors=tuple(_changed_sensors(spec, entry, spectral)),
        crop_m=spec.crop_m if entry.crop_m is None else entry.crop_m,
    )
    if problems := [*_unknown_sensors(spec, entry), *view_problems(resolved)]:
        raise RecipeError(_lines(where, problems))
    return resolved


def build_model_config(recipe: Recipe, specs: Sequence[DatasetSpec]) -> ModelConfig:
    """The model that a recipe describes for its datasets, in the order of the mixture; ``specs`` are resolved.

    RecipeError where sensors of several datasets cannot share weights, or where targets cannot be normalised.
    """
    names = [dotted(("data", "mixture", i)) for i in range(len(specs))]
    shared = [(name, spec.sensors) for name, spec in zip(names, specs, strict=True)]
    problems = list(sharing_problems(shared))
    for name, spec in zip(names, specs, strict=True):
        found = target_group_problems(spec.sensors, recipe.model.target)
        problems += [((name, "sensors", *path), reason) for path, reason in found]
    if problems:
        raise RecipeError(_lines((), problems))
    labels = mixture_names([spec.name for spec in specs])
    first, *others = (DatasetView.of_spec(spec, label) for label, spec in zip(labels, specs, strict=True))
    m = recipe.model
    return ModelConfig(
        **vars(first),
        others=tuple(others),
        size=m.dimensions,
        fusion=m.fusion,
        inter_depth=m.inter_depth,
        spectral=m.spectral,
        norm=m.norm,
        target=m.target,
        loss=m.loss,
        checkpointing=m.checkpointing,
        attention=m.attention,
    )


def build_masking(recipe: Recipe) -> MaskingConfig:
    """The masks of a pretraining: without structural masks, the probabilities of all of them are 0.

    The loader draws the same numbers in both cases (``stream/batch.py:num_noise``).
    """
    m = recipe.masking
    if not recipe.has_structural_masks:
        return MaskingConfig(m.ratio, modality=0.0, date=0.0, location=0.0, band_group=0.0)
    return MaskingConfig(m.ratio, m.modality, m.date, m.location, m.band_group)


def _changed_sensors(spec: DatasetSpec, entry: MixtureEntry, spectral: Spectral) -> Iterator[Sensor]:
    """The preset's sensors in order, changed or left out as ``entry.sensors`` says."""
    for sensor in spec.sensors:
        override = entry.sensors.get(sensor.name, SensorOverride())
        if override is None:
            continue
        changed = _changed(sensor, override)
        # Only with ``token``: the number of token groups is part of the noise of a sample, and joint runs must draw the
        # numbers that they always drew. An empty list in the recipe asks for one token of all bands.
        if spectral == "token" and not changed.token_groups and override.token_groups is None:
            groups = changed.band_groups if len(changed.band_groups) > 1 else ()
            changed = dataclasses.replace(changed, token_groups=groups)
        yield changed


def _changed(sensor: Sensor, override: SensorOverride) -> Sensor:
    changes = {name: getattr(override, name) for name in override.model_fields_set}
    changes = {name: value for name, value in changes.items() if value is not None}
    if override.scale is not None:
        changes["scale"] = dataclasses.replace(sensor.scale, **override.scale.model_dump(exclude_none=True))
    return dataclasses.replace(sensor, **changes)


def _unknown_sensors(spec: DatasetSpec, entry: MixtureEntry) -> Iterator[Problem]:
    known = [s.name for s in spec.sensors]
    for name in entry.sensors:
        if name not in known:
            yield ("sensors", name), f"unknown sensor{did_you_mean(name, known)}"


def _lines(where: KeyPath, problems: Sequence[Problem]) -> str:
    return "\n".join(f"{dotted((*where, *path))}: {reason}" for path, reason in problems)
