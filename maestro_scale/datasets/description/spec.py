"""The spec of a described dataset: modalities, targets and the preset of sensors that its description stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.sections.fields import QuantityKind
from maestro_scale.datasets.description.sections.rasters import Raster, SensorPreset
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.quantity import QUANTITY_KINDS
from maestro_scale.datasets.spec import NODATA, DatasetSpec, Modality, Scale, Sensor, Target
from maestro_scale.datasets.spec_check import default_pos_grid
from maestro_scale.datasets.spec_limits import MAX_SIDE

_SCALES: Mapping[QuantityKind, Scale] = {
    "reflectance": Scale("linear", 10_000),
    "backscatter_db": Scale("linear", 20),
    "backscatter_linear": Scale("log", 5),
    "elevation": Scale("linear", 1000),
}
_MAX_TOKENS = 20  # per side, of a sensor without ``patch``
_DATES = 8  # per sample, of a series without ``num_dates``


def dataset_spec(description: Description) -> DatasetSpec:
    """The spec that ``description`` stands for; whether it is consistent is for spec_check to say."""
    rasters = {name: raster for name, raster in description.rasters.items() if raster is not None}
    crop_m = description.crop_m or description.tile_m
    modalities = tuple(
        _modality(name, raster, description.tile_m, len(rasters) > 1 and not is_required(description, raster))
        for name, raster in rasters.items()
    )
    sensors = [
        _sensor(name, name, raster.sensor, raster, crop_m)
        for name, raster in rasters.items()
        if raster.sensor is not None
    ]
    sensors += [
        _sensor(name, preset.source, preset, rasters[preset.source], crop_m)
        for name, preset in description.sensors.items()
    ]
    targets = tuple(_target(name, t) for name, t in description.targets.items() if t is not None)
    return DatasetSpec(
        name=description.name,
        title=description.title or description.name,
        tile_m=description.tile_m,
        crop_m=crop_m,
        pos_grid=description.pos_grid or default_pos_grid(sensors),
        modalities=modalities,
        targets=targets,
        sensors=tuple(sensors),
        ref_sensor=description.ref_sensor or _ref_sensor(sensors, targets, modalities),
    )


def is_required(description: Description, raster: Raster) -> bool:
    """Whether a tile without this raster is left out."""
    return description.grid is not None if raster.required is None else raster.required


def default_scale(quantity: QuantityKind, dtype: str) -> Scale | None:
    """How values of a quantity become network inputs if nothing else is said; None: it has to be said."""
    if quantity in ("image", "any"):
        return Scale("linear", 255) if dtype == "uint8" else None
    return _SCALES[quantity]


def default_patch(image_size: int) -> int:
    """The smallest divisor, of at least 2, that gives at most 20 patches a side."""
    if image_size > MAX_SIDE:  # spec_problems refuses it
        return 1
    least = max(2, -(-image_size // _MAX_TOKENS))
    return next((d for d in range(least, image_size + 1) if image_size % d == 0), max(image_size, 1))


def _modality(name: str, raster: Raster, tile_m: float, optional: bool) -> Modality:
    return Modality(
        name=name,
        bands=tuple(band.name for band in raster.bands),
        resolution_m=raster.resolution_m,
        size=_pixels(tile_m, raster.resolution_m),
        dtype=raster.dtype,
        series=raster.series,
        mask_bands=(*raster.masks, *([NODATA] if raster.nodata_mask and NODATA not in raster.masks else [])),
        quantity=_stored_quantity(raster),
        optional=optional,
    )


def settings_of(description: Description) -> str:
    """SHA-256 of what determines the tiles beside their keys: not of how models use them, nor of the splits."""
    other = {"title", "sensors", "splits", "ref_sensor", "crop_m", "pos_grid", "synthetic"}
    content = description.model_dump(mode="json", by_alias=True, exclude=other)
    for raster in content["rasters"].values():
        if raster is not None:
            del raster["sensor"]
    vectors = [target["vector"] for target in content["targets"].values() if target is not None]
    for section in (*vectors, (content["grid"] or {}).get("area")):
        if section is not None and section["crs"] is None:
            del section["crs"]  # a later key: shards from before it keep their digest
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _pixels(extent_m: float, resolution_m: float) -> int:
    """Pixels of an extent; of one that spec_problems refuses a number that it refuses, too."""
    return round(min(extent_m / resolution_m, 1e9))


def _stored_quantity(raster: Raster) -> QuantityKind:
    """What stored values are checked against: not the quantity if the description's valid range is wider than its."""
    low, high = raster.valid or (None, None)
    limits = QUANTITY_KINDS[raster.quantity]
    wider = (low is not None and low <= limits.above) or (high is not None and high > limits.up_to)
    return "any" if wider else raster.quantity


def _sensor(name: str, source: str, preset: SensorPreset, raster: Raster, crop_m: float) -> Sensor:
    names = [band.name for band in raster.bands]
    bands = tuple(range(len(names))) if preset.bands is None else tuple(map(names.index, preset.bands))
    image_size = preset.image_size or _pixels(crop_m, raster.resolution_m)
    scale = default_scale(raster.quantity, raster.dtype) or Scale()
    if preset.scale is not None:
        scale = Scale(preset.scale.kind, preset.scale.divisor)
    return Sensor(
        name=name,
        source=source,
        image_size=image_size,
        patch=preset.patch or default_patch(image_size),
        num_dates=preset.num_dates or (_DATES if raster.series else 1),
        bands=bands,
        band_groups=(len(bands),) if preset.band_groups is None else preset.band_groups,
        scale=scale,
        group=preset.group or name,
        embed=preset.embed or name,
        mask_threshold=preset.mask_threshold,
        token_groups=preset.token_groups,
        elevation=preset.elevation,
    )


def _target(name: str, keys: TargetKeys) -> Target:
    return Target(
        name=name,
        kind=keys.kind,
        classes=keys.classes,
        ignored=tuple(keys.classes.index(c) for c in keys.ignored),
        threshold=keys.threshold,
        resolution_m=keys.resolution_m,
        of=keys.of,
        units=keys.units,
    )


def _ref_sensor(
    sensors: Sequence[Sensor], targets: Sequence[Target], modalities: Sequence[Modality]
) -> str | None:
    """The sensor whose pixels are nearest to those of the first map among the targets; else the first sensor."""
    resolution_m = next((t.resolution_m for t in targets if t.is_map and t.resolution_m), None)
    if not sensors or resolution_m is None:
        return sensors[0].name if sensors else None
    pixels_m = {m.name: m.resolution_m for m in modalities}

    def distance(sensor: Sensor) -> float:
        pixel_m = pixels_m[sensor.source]
        return max(pixel_m / resolution_m, resolution_m / pixel_m)

    return min(sensors, key=distance).name
