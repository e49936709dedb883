"""The sensors a run sees: a dataset's preset with the recipe's changes."""

from __future__ import annotations

import dataclasses

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.model.config import DatasetView, conflicts
from maestro_scale.recipe.data import MixtureEntry, SensorOverride
from maestro_scale.recipe.errors import RecipeError, did_you_mean


def resolve_spec(spec: DatasetSpec, entry: MixtureEntry) -> DatasetSpec:
    """``spec`` as ``entry`` wants it seen: its sensors and its crop. RecipeError if that is not possible."""
    crop_m = entry.crop_m or spec.crop_m
    if crop_m > spec.tile_m:
        raise RecipeError(
            f"data.mixture: {spec.name}: crop_m {crop_m:g} is larger than a tile, {spec.tile_m:g} m"
        )
    return dataclasses.replace(spec, crop_m=crop_m, sensors=resolve_sensors(spec, entry))


def resolve_sensors(spec: DatasetSpec, entry: MixtureEntry) -> tuple[Sensor, ...]:
    """The preset's sensors in order, changed or left out as ``entry.sensors`` says.

    Raises:
        RecipeError: a sensor that the dataset does not have, or changes that do not fit the data or each
            other; one line per mistake.
    """
    known = [s.name for s in spec.sensors]
    where = f"data.mixture: {spec.name}.sensors"
    wrong = [f"{where}.{n}: unknown sensor{did_you_mean(n, known)}" for n in entry.sensors if n not in known]
    changed = [
        _changed(sensor, entry.sensors[sensor.name]) if sensor.name in entry.sensors else sensor
        for sensor in spec.sensors
    ]
    kept = tuple(sensor for sensor in changed if sensor is not None)
    for sensor in kept:
        wrong += [f"{where}.{sensor.name}.{problem}" for problem in _problems(spec, sensor)]
    wrong += [f"{where}.{problem}" for problem in conflicts([DatasetView("", kept, spec.pos_grid)])]
    if not kept:
        wrong.append(f"{where}: every sensor is left out")
    if spec.ref_sensor in known and spec.ref_sensor not in {s.name for s in kept}:
        wrong.append(f"{where}.{spec.ref_sensor}: cannot be left out, segmentation is predicted on its grid")
    if wrong:
        raise RecipeError("\n".join(wrong))
    return kept


def _changed(sensor: Sensor, override: SensorOverride | None) -> Sensor | None:
    if override is None:
        return None
    changes = {name: getattr(override, name) for name in override.model_fields_set}
    changes = {name: value for name, value in changes.items() if value is not None}
    if override.scale is not None:
        changes["scale"] = dataclasses.replace(sensor.scale, **override.scale.model_dump(exclude_none=True))
    return dataclasses.replace(sensor, **changes)


def _problems(spec: DatasetSpec, sensor: Sensor) -> list[str]:
    sources = {m.name: m for m in spec.modalities}
    found = []
    if sensor.image_size % sensor.patch:
        found.append(f"patch: {sensor.patch} does not divide image_size {sensor.image_size}")
    for name, groups in (("band_groups", sensor.band_groups), ("token_groups", sensor.token_groups)):
        if sum(groups) != len(sensor.bands) and (groups or name == "band_groups"):
            found.append(f"{name}: {list(groups)} do not add up to {len(sensor.bands)} bands")
    if sensor.elevation and len(sensor.bands) != 2:
        found.append(f"elevation: needs 2 bands (surface, terrain), there are {len(sensor.bands)}")
    if sensor.source not in sources:
        return [*found, f"source: unknown modality {sensor.source!r}{did_you_mean(sensor.source, sources)}"]
    source = sources[sensor.source]
    if sensor.bands and max(sensor.bands) >= len(source.bands):
        found.append(f"bands: {max(sensor.bands)} is beyond the {len(source.bands)} bands of {source.name}")
    if not source.series and sensor.num_dates != 1:
        found.append(f"num_dates: {source.name} is a single image, so 1, not {sensor.num_dates}")
    return found
