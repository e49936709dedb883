"""Validation rules for sensors, sizes, crops and dataset specs; each rule is implemented here and nowhere else.

A rule returns (path, reason) pairs instead of raising: the manifest, the recipe, the model config and the stream put
their own prefix before the path and raise their own error type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from maestro_scale.datasets.quantity import QUANTITY_KINDS
from maestro_scale.datasets.spec import NODATA, DatasetSpec, Modality, Sensor, Target
from maestro_scale.datasets.spec_limits import (
    MAX_CLASSES,
    MAX_DATES,
    MAX_ITEMS,
    MAX_POS_GRID,
    MAX_SIDE,
    MAX_UNITS,
    NUM_CLASS_INDICES,
    Problem,
    count_problems,
    extent_problems,
    module_name_problem,
    name_problem,
    scale_problems,
)
from maestro_scale.errors import KeyPath, did_you_mean, shorten
from maestro_scale.untrusted.limits import FIELD_BYTES

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

_MAX_DEFAULT_POS_GRID = 1024

EXTENT_TOLERANCE_M = 1e-6
"""Extents and resolutions are decimal fractions: differences up to this are rounding errors."""


def spec_problems(spec: DatasetSpec) -> Iterator[Problem]:
    """What contradicts itself or is impossible in the spec of a stored dataset; checked when a manifest is read.

    Whether the crop fits and the sensors can share weights is left to ``view_problems``: a recipe can change these, so
    a manifest whose own preset does not fit is still usable.
    """
    if (reason := name_problem(spec.name)) is not None:
        yield ("name",), reason
    named: dict[str, Sequence[Modality | Target | Sensor]] = {
        "modalities": spec.modalities,
        "targets": spec.targets,
        "sensors": spec.sensors,
    }
    for part, items in named.items():
        if len(items) > MAX_ITEMS:
            yield (part,), f"has {len(items)} entries; at most {MAX_ITEMS} are supported"
            return
        earlier: set[str] = set()
        for i, item in enumerate(items):
            if (reason := name_problem(item.name)) is not None:
                yield (part, i, "name"), reason
            if item.name in earlier:
                yield (part, i, "name"), f"{item.name!r} is there twice"
            earlier.add(item.name)
    if not spec.modalities:
        yield ("modalities",), "is empty; a dataset has at least one"
    extents = [p for field in ("tile_m", "crop_m") for p in extent_problems(field, getattr(spec, field))]
    if extents:
        yield from extents
        return  # the other rules compute with the extents
    yield from count_problems("pos_grid", spec.pos_grid, MAX_POS_GRID)
    for i, modality in enumerate(spec.modalities):
        yield from _below(("modalities", i), _modality_problems(modality, spec.tile_m))
    for i, target in enumerate(spec.targets):
        yield from _below(("targets", i), _target_problems(target, spec))
    for i, sensor in enumerate(spec.sensors):
        # Bands first: groups that do not add up may only follow from them.
        yield from _below(("sensors", i), source_problems(sensor, spec.modalities))
        yield from _below(("sensors", i), sensor_problems(sensor))
    names = [s.name for s in spec.sensors]
    if spec.ref_sensor is not None and spec.ref_sensor not in names:
        yield ("ref_sensor",), f"{spec.ref_sensor!r} is not one of the sensors ({', '.join(names)})"


def default_pos_grid(sensors: Sequence[Sensor]) -> int:
    """Position grid: a common multiple of the sensors' token grids; if that is too large, the largest of them."""
    # An invalid patch must not divide by zero here; spec_problems refuses it afterwards.
    grids = [max(s.image_size // max(s.patch, 1), 1) for s in sensors] or [1]
    common = math.lcm(*grids)
    return common if common <= _MAX_DEFAULT_POS_GRID else max(grids)


def sensor_problems(sensor: Sensor) -> Iterator[Problem]:
    """Contradictions within a sensor, independent of its source."""
    if (reason := patch_problem(sensor.image_size, sensor.patch)) is not None:
        yield ("patch",), reason
    if sensor.image_size > MAX_SIDE:
        yield ("image_size",), f"is {sensor.image_size}; at most {MAX_SIDE} is supported"
    yield from count_problems("num_dates", sensor.num_dates, MAX_DATES)
    yield from _below(("scale",), scale_problems(sensor.scale))
    if not 0 <= sensor.mask_threshold <= 100:
        yield ("mask_threshold",), f"is {sensor.mask_threshold:g}, must be a percentage from 0 to 100"
    for field in ("name", "group", "embed"):
        if (reason := module_name_problem(getattr(sensor, field))) is not None:
            yield (field,), reason
    yield from group_problems(len(sensor.bands), sensor.band_groups, sensor.token_groups)
    if sensor.elevation and len(sensor.bands) != 2:
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
        indices = shorten(list(sensor.bands))
        yield (
            ("bands",),
            f"{indices} do not index the {num_bands} bands of {source.name} (0 to {num_bands - 1})",
        )
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
    for field, sizes in (("band_groups", band_groups), ("token_groups", token_groups)):
        if field == "token_groups" and not sizes:
            continue
        if any(size < 1 for size in sizes):
            yield (field,), f"{shorten(list(sizes))} contains a group of less than one band"
        elif sum(sizes) != num_bands:
            yield (field,), f"{shorten(list(sizes))} do not add up to {num_bands} bands"


def crop_problems(spec: DatasetSpec) -> Iterator[Problem]:
    """Why squares of ``crop_m`` metres cannot be cut out of the tiles for the sensors of ``spec``."""
    if problems := [*extent_problems("tile_m", spec.tile_m), *extent_problems("crop_m", spec.crop_m)]:
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
        return
    for modality in (spec.modality(name) for name in dict.fromkeys(s.source for s in spec.sensors)):
        side = round(spec.crop_m / modality.resolution_m)
        if side > modality.size:
            yield (
                ("crop_m",),
                f"{spec.crop_m:g} m are {side} pixels of {modality.name}, which has {modality.size} per side",
            )


def view_problems(spec: DatasetSpec) -> Iterator[Problem]:
    """Why the model cannot be trained on ``spec`` with its sensors and crop, where ``spec_problems`` found nothing.

    Paths contain names of sensors, as in a recipe: ``("sensors", "s2", "patch")``.
    """
    for sensor in spec.sensors:
        # Bands first: groups that do not add up may only follow from them.
        for path, reason in (*source_problems(sensor, spec.modalities), *sensor_problems(sensor)):
            yield ("sensors", sensor.name, *path), reason
    for path, reason in sharing_problems([("", spec.sensors)]):
        yield ("sensors", *path), reason
    names = {s.name for s in spec.sensors}
    if not names:
        yield ("sensors",), "every sensor is left out"
    if spec.ref_sensor is not None and spec.ref_sensor not in names:
        yield ("sensors", spec.ref_sensor), "cannot be left out, segmentation is predicted on its grid"
    if all(s.source in {m.name for m in spec.modalities} for s in spec.sensors):
        yield from crop_problems(spec)


SHARING_ADVICE = ": change both alike, or give it its own embed"


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
                    f"{_embed_input(other)}{SHARING_ADVICE}",
                )
            there, other = names.setdefault(s.name, (here, s))
            if s.max_token_groups != other.max_token_groups:
                yield (
                    (*here, "token_groups"),
                    f"{list(s.token_groups)}, but {'.'.join(map(str, there))} has {list(other.token_groups)}: sensors "
                    "of one name share their mask tokens",
                )


def target_group_problems(
    sensors: Sequence[Sensor], target: Literal["patch_group", "patch", "none"]
) -> Iterator[Problem]:
    """Sensors with a group of one value, over which a target cannot be normalised: (name of the sensor, key), reason.

    ``target``: over which values of a patch the target is normalised (``model.target``). The variance of one value is
    0 / 0, so the loss would be NaN. A property of the model, not of the data: a spec with such groups can be stored.
    """
    for s in sensors:
        if target == "none" or s.patch != 1:
            continue
        if target == "patch" and len(s.bands) == 1:
            reason = (
                "1 pixel of 1 band is a single value, which model.target=patch cannot normalise: use a larger patch or "
                "model.target=none"
            )
            yield (s.name, "patch"), reason
        if target == "patch_group" and 1 in s.band_groups:
            index = s.band_groups.index(1)
            reason = (
                f"{shorten(list(s.band_groups))}: group {index} has one band, and with patch 1 a single value, which "
                "model.target=patch_group cannot normalise: use larger groups, a larger patch, or model.target="
                f"{'none' if len(s.bands) == 1 else 'patch'}"
            )
            yield (s.name, "band_groups"), reason


def _embed_input(sensor: Sensor) -> str:
    groups = f" in token_groups {list(sensor.token_groups)}" if sensor.token_groups else ""
    return f"patch {sensor.patch} of {len(sensor.bands)} bands{groups}"


def _modality_problems(modality: Modality, tile_m: float) -> Iterator[Problem]:
    if modality.dtype not in DTYPES:
        yield ("dtype",), f"{shorten(modality.dtype)} is not one of {', '.join(DTYPES)}"
        return
    if modality.quantity and modality.quantity not in QUANTITY_KINDS:
        yield (
            ("quantity",),
            f"unknown quantity {shorten(modality.quantity)}{did_you_mean(modality.quantity, QUANTITY_KINDS)}",
        )
    if modality.mask_bands.count(NODATA) > 1:
        yield ("mask_bands",), f"{NODATA!r} is there twice"
    if modality.size < 1 or not modality.bands:
        yield (), f"has {len(modality.bands)} bands of {modality.size} pixels a side"
    if problems := [*extent_problems("resolution_m", modality.resolution_m)]:
        yield from problems
        return
    channels = max(len(modality.bands), len(modality.mask_bands))
    if modality.size > MAX_SIDE or channels * modality.size**2 * _item_bytes(modality.dtype) > FIELD_BYTES:
        yield (
            ("size",),
            f"{channels} channels of {modality.size} pixels a side: an image takes more than "
            f"{FIELD_BYTES // 2**20} MiB",
        )
    extent_m = modality.size * modality.resolution_m
    # Loose, because pixels at the border may exceed the tile; it finds a wrong unit, or a size of other bands.
    if extent_m > 2 * tile_m or 2 * extent_m < tile_m:
        yield (
            ("resolution_m",),
            f"{modality.size} pixels of {modality.resolution_m:g} m are {extent_m:g} m, but a tile has {tile_m:g} m",
        )


def _item_bytes(dtype: str) -> int:
    """Bytes of a value of one of ``DTYPES``."""
    bits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(bits) // 8 if bits else 1  # bool has no digits


def _target_problems(target: Target, spec: DatasetSpec) -> Iterator[Problem]:
    if target.kind == "regression":
        yield from _regression_problems(target, spec.tile_m)
        return
    if target.units:
        yield ("units",), f"is {shorten(target.units)}, but only a regression target has units"
    if not target.classes:
        yield ("classes",), "is empty"
    elif len(set(target.classes)) < len(target.classes):
        twice = next(c for i, c in enumerate(target.classes) if c in target.classes[:i])
        yield ("classes",), f"{shorten(twice)} is there twice"
    elif target.num_outputs == 0:
        yield ("ignored",), "contains every class, so nothing is left to predict"
    if not 0 <= target.threshold < 1:
        yield ("threshold",), f"is {target.threshold:g}, must be an area share: at least 0 and less than 1"
    if target.kind == "segmentation":
        yield from _segmentation_problems(target, spec.tile_m)
    elif target.resolution_m is not None:
        yield from extent_problems("resolution_m", target.resolution_m)
    if target.kind == "classification":
        yield from _classification_problems(target)
    if target.of is not None:
        yield from _derived_problems(target, {t.name: t for t in spec.targets if t.kind == "segmentation"})


def _segmentation_problems(target: Target, tile_m: float) -> Iterator[Problem]:
    if len(target.classes) > NUM_CLASS_INDICES:
        yield ("classes",), f"has {len(target.classes)} classes; at most {NUM_CLASS_INDICES} can be stored"
    if wrong := [i for i in target.ignored if not 0 <= i < NUM_CLASS_INDICES]:
        yield (
            ("ignored",),
            f"contains {wrong[0]}, which is not a stored value (0 to {NUM_CLASS_INDICES - 1})",
        )
    if target.resolution_m is None:
        yield ("resolution_m",), "is missing; a segmentation target has pixels of a size"
    else:
        yield from _map_problems(target.resolution_m, tile_m)


def _classification_problems(target: Target) -> Iterator[Problem]:
    if len(target.classes) > MAX_CLASSES:
        yield ("classes",), f"has {len(target.classes)} classes; at most {MAX_CLASSES} are supported"
    if wrong := [i for i in target.ignored if not 0 <= i < MAX_CLASSES]:
        yield ("ignored",), f"contains {wrong[0]}, which is not a stored value (0 to {MAX_CLASSES - 1})"
    if target.resolution_m is not None:
        yield (
            ("resolution_m",),
            "is given, but the label is of the whole tile; use a segmentation target for maps",
        )


def _regression_problems(target: Target, tile_m: float) -> Iterator[Problem]:
    for field in ("classes", "ignored", "threshold", "of"):
        if getattr(target, field):
            yield (field,), "is given, but a regression target has none; missing values are NaN"
    if len(target.units) > MAX_UNITS or not target.units.isprintable():
        yield ("units",), f"{shorten(target.units)} is not at most {MAX_UNITS} printable characters"
    if target.resolution_m is not None:
        yield from _map_problems(target.resolution_m, tile_m)


def _map_problems(resolution_m: float, tile_m: float) -> Iterator[Problem]:
    if problems := [*extent_problems("resolution_m", resolution_m)]:
        yield from problems
    elif math.isfinite(tile_m) and not 1 <= round(tile_m / resolution_m) <= MAX_SIDE:
        yield (
            ("resolution_m",),
            f"{resolution_m:g} m gives {round(tile_m / resolution_m)} pixels per side of a tile of "
            f"{tile_m:g} m; 1 to {MAX_SIDE} are supported",
        )


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
