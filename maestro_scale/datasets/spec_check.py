"""Validation rules for sensors, sizes, crops and dataset specs; each rule is implemented here and nowhere else.

A rule returns (path, reason) pairs instead of raising: the manifest, the recipe, the model config and the stream put
their own prefix before the path and raise their own error type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from maestro_scale.datasets.spec import DatasetSpec, Modality, Sensor, Target
from maestro_scale.errors import KeyPath, did_you_mean

Problem = tuple[KeyPath, str]
"""(path of the field from the object that was checked, reason): ``(("sensors", 0, "patch"), "4 does not …")``."""

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "float16",
    "uint32",
    "int32",
    "float32",
    "uint64",
    "int64",
    "float64",
)
"""Dtypes that shards can hold, by their numpy names."""

EXTENT_TOLERANCE_M = 1e-6
"""Extents and resolutions are decimal fractions: differences up to this are rounding errors."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = ("target", "ref_date")  # fields of a stored sample
_ELEVATION_BANDS = 2


def spec_problems(spec: DatasetSpec) -> Iterator[Problem]:
    """What contradicts itself in the spec of a stored dataset. Whether the crop fits is left to ``crop_problems``.

    A recipe can replace the crop, so a manifest whose own crop does not fit is still usable.
    """
    if (reason := _name_problem(spec.name)) is not None:
        yield ("name",), reason
    named: dict[str, Sequence[Modality | Target | Sensor]] = {
        "modalities": spec.modalities,
        "targets": spec.targets,
        "sensors": spec.sensors,
    }
    for part, items in named.items():
        names = [item.name for item in items]
        for i, name in enumerate(names):
            if (reason := _name_problem(name)) is not None:
                yield (part, i, "name"), reason
            if name in names[:i]:
                yield (part, i, "name"), f"{name!r} is there twice"
    if not spec.modalities:
        yield ("modalities",), "is empty; a dataset has at least one"
    for field in ("tile_m", "crop_m"):
        yield from _extent_problems(field, getattr(spec, field))
    if spec.pos_grid < 1:
        yield ("pos_grid",), f"is {spec.pos_grid}, must be at least 1"
    for i, modality in enumerate(spec.modalities):
        yield from _below(("modalities", i), _modality_problems(modality))
    for i, target in enumerate(spec.targets):
        yield from _below(("targets", i), _target_problems(target, spec.targets))
    for i, sensor in enumerate(spec.sensors):
        # Bands first: groups that do not add up may only follow from them.
        yield from _below(("sensors", i), source_problems(sensor, spec.modalities))
        yield from _below(("sensors", i), sensor_problems(sensor))
    names = [s.name for s in spec.sensors]
    if spec.ref_sensor is not None and spec.ref_sensor not in names:
        yield ("ref_sensor",), f"{spec.ref_sensor!r} is not one of the sensors ({', '.join(names)})"


def sensor_problems(sensor: Sensor) -> Iterator[Problem]:
    """Contradictions within a sensor, independent of its source."""
    if (reason := patch_problem(sensor.image_size, sensor.patch)) is not None:
        yield ("patch",), reason
    if sensor.num_dates < 1:
        yield ("num_dates",), f"is {sensor.num_dates}, must be at least 1"
    yield from group_problems(len(sensor.bands), sensor.band_groups, sensor.token_groups)
    if sensor.elevation and len(sensor.bands) != _ELEVATION_BANDS:
        yield ("elevation",), f"needs 2 bands (surface, terrain), there are {len(sensor.bands)}"


def source_problems(sensor: Sensor, modalities: Sequence[Modality]) -> Iterator[Problem]:
    """Why ``sensor`` cannot read its modality among those that are stored."""
    known = {m.name: m for m in modalities}
    if sensor.source not in known:
        yield ("source",), f"unknown modality {sensor.source!r}{did_you_mean(sensor.source, known)}"
        return
    source = known[sensor.source]
    num_bands = len(source.bands)
    if not sensor.bands or not all(0 <= band < num_bands for band in sensor.bands):
        reason = (
            f"{list(sensor.bands)} do not index the {num_bands} bands of {source.name} (0 to {num_bands - 1})"
        )
        yield ("bands",), reason
    if not source.series and sensor.num_dates != 1:
        yield ("num_dates",), f"{source.name} is a single image, so 1, not {sensor.num_dates}"


def patch_problem(image_size: int, patch: int) -> str | None:
    """Why an image of ``image_size`` pixels per side cannot be cut into patches of ``patch``."""
    if image_size < 1 or patch < 1 or image_size % patch:
        return f"{patch} does not divide image_size {image_size}"
    return None


def group_problems(
    num_bands: int, band_groups: Sequence[int], token_groups: Sequence[int]
) -> Iterator[Problem]:
    """Groups of bands that leave bands out or have too many; no ``token_groups`` are one token for all bands."""
    if sum(band_groups) != num_bands:
        yield ("band_groups",), f"{list(band_groups)} do not add up to {num_bands} bands"
    if token_groups and sum(token_groups) != num_bands:
        yield ("token_groups",), f"{list(token_groups)} do not add up to {num_bands} bands"


def crop_problems(spec: DatasetSpec) -> Iterator[Problem]:
    """Why squares of ``crop_m`` metres cannot be cut out of the tiles for the sensors of ``spec``."""
    if problems := [*_extent_problems("tile_m", spec.tile_m), *_extent_problems("crop_m", spec.crop_m)]:
        yield from problems
        return
    if spec.crop_m > spec.tile_m + EXTENT_TOLERANCE_M:
        yield ("crop_m",), f"{spec.crop_m:g} m is larger than a tile, {spec.tile_m:g} m"
        return
    if spec.crop_m > spec.tile_m - EXTENT_TOLERANCE_M or not spec.sensors:
        return  # a whole tile is never cut
    # Crops start at multiples of the coarsest pixel, so that all sensors cover the same ground.
    step_m = max(spec.modality(s.source).resolution_m for s in spec.sensors)
    steps = spec.crop_m / step_m
    if round(steps) < 1 or abs(steps - round(steps)) > EXTENT_TOLERANCE_M:
        below, above = math.floor(steps) * step_m, math.ceil(steps) * step_m
        near = [f"{m:g}" for m in (below, above) if 0 < m <= spec.tile_m + EXTENT_TOLERANCE_M]
        reason = f"{spec.crop_m:g} m is not a multiple of the coarsest sensor's pixel, {step_m:g} m"
        yield ("crop_m",), f"{reason}: use {' or '.join(near or [f'{spec.tile_m:g}'])}"


def sharing_problems(datasets: Sequence[tuple[str, Sequence[Sensor]]]) -> Iterator[Problem]:
    """Why the sensors of these (name, sensors) cannot share weights; a path begins with the name, unless that is empty.

    Sensors of one ``embed`` must feed it the same patch and bands; sensors of one name share their mask tokens.
    """
    embeds: dict[str, tuple[KeyPath, Sensor]] = {}
    names: dict[str, tuple[KeyPath, Sensor]] = {}
    for dataset, sensors in datasets:
        for s in sensors:
            here: KeyPath = (dataset, "sensors", s.name) if dataset else (s.name,)
            there, other = embeds.setdefault(s.embed, (here, s))
            if _embed_input(s) != _embed_input(other):
                yield (
                    (*here, "embed"),
                    f"{s.embed!r} is shared with {'.'.join(map(str, there))}, but {_embed_input(s)} differs from "
                    f"{_embed_input(other)}: change both alike, or give it its own embed",
                )
            there, other = names.setdefault(s.name, (here, s))
            if s.max_token_groups != other.max_token_groups:
                yield (
                    (*here, "token_groups"),
                    f"{list(s.token_groups)}, but {'.'.join(map(str, there))} has {list(other.token_groups)}: sensors "
                    "of one name share their mask tokens",
                )


def _embed_input(sensor: Sensor) -> str:
    groups = f" in token_groups {list(sensor.token_groups)}" if sensor.token_groups else ""
    return f"patch {sensor.patch} of {len(sensor.bands)} bands{groups}"


def _name_problem(name: str) -> str | None:
    # Names of fields join these with dots, and file names contain them.
    if not _NAME.fullmatch(name) or name in _RESERVED:
        return f"{name!r} is not a valid name; use letters, digits, '_' and '-'"
    return None


def _extent_problems(field: str, value: float) -> Iterator[Problem]:
    if not (math.isfinite(value) and value > 0):
        yield (field,), f"is {value:g}, must be a positive number of metres"


def _modality_problems(modality: Modality) -> Iterator[Problem]:
    if modality.dtype not in DTYPES:
        yield ("dtype",), f"{modality.dtype!r} is not one of {', '.join(DTYPES)}"
    if modality.size < 1 or not modality.bands:
        yield (), f"has {len(modality.bands)} bands of {modality.size} pixels a side"
    yield from _extent_problems("resolution_m", modality.resolution_m)


def _target_problems(target: Target, targets: Sequence[Target]) -> Iterator[Problem]:
    if not target.classes:
        yield ("classes",), "is empty"
    if target.kind == "segmentation" and target.resolution_m is None:
        yield ("resolution_m",), "is missing; a segmentation target has pixels of a size"
    if target.resolution_m is not None:
        yield from _extent_problems("resolution_m", target.resolution_m)
    if target.of is not None:
        yield from _derived_problems(target, {t.name: t for t in targets if t.kind == "segmentation"})


def _derived_problems(target: Target, sources: Mapping[str, Target]) -> Iterator[Problem]:
    if target.kind != "multilabel" or target.of is None or target.of not in sources:
        yield ("of",), f"{target.of!r} is not a segmentation target whose shares can be counted"
        return
    unknown = [c for c in target.classes if c not in sources[target.of].classes]
    if unknown:
        yield ("of",), f"{target.of} has no class {unknown[0]!r}"


def _below(path: KeyPath, problems: Iterator[Problem]) -> Iterator[Problem]:
    for below, reason in problems:
        yield (*path, *below), reason
