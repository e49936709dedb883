"""The catalog of scenes: opens every image once, for where it lies, and checks that they fit together.

Only headers are read. The catalog is small (a few hundred bytes per image) and travels to writer processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.scenes.buffer import Opener
from maestro_scale.datasets.scenes.grid import Box, parse_crs
from maestro_scale.datasets.scenes.ground import LON_LAT, check_metric, is_on_earth
from maestro_scale.datasets.scenes.images import Scene, Shot
from maestro_scale.datasets.scenes.problems import Problems
from maestro_scale.datasets.scenes.warp import Placement, transformer
from maestro_scale.datasets.sources.protocol import Date, Image, ImageRef, OpenFile
from maestro_scale.datasets.sources.table import source_of
from maestro_scale.datasets.spec import DatasetError

_THREADS = 8  # opening a remote file waits for the network
_EDGE_POINTS = 21
_LATTICE_DECIMALS = 6


@dataclass(frozen=True)
class Layer:
    """The images that one section of a description lists. ``name``: ``s2``, ``s2.cloud``, ``landcover``."""

    name: str
    section: ImageFiles
    refs: tuple[ImageRef, ...]


@dataclass(frozen=True)
class SourceOpener:
    """Opens the files of layers by their sources. ``sections``: by layer."""

    sections: Mapping[str, ImageFiles]

    def __call__(self, layer: str, address: str) -> AbstractContextManager[OpenFile]:
        section = self.sections[layer]
        return source_of(section).open_file(address, section)


def locate(layer: Layer, src: str, opener: Opener, problems: Problems) -> list[Scene]:
    """The images of a layer with their places, in the order of their names, without their boxes.

    Adds to ``problems`` files that cannot be read, have no place on the ground, or a date that is not in the calendar.
    """
    by_address: dict[str, list[ImageRef]] = {}
    for ref in layer.refs:
        by_address.setdefault(ref.address, []).append(ref)
    scenes: list[Scene] = []
    # Bands of a file are listed as several references at most; a file is opened once for all of them.
    with ThreadPoolExecutor(_THREADS if len(by_address) > 1 else 1) as pool:
        work = pool.map(lambda item: _located(layer, src, item[0], item[1], opener), by_address.items())
        for found in work:
            if isinstance(found, _Problem):
                problems.add(found.kind, found.example, found.advice)
            else:
                scenes += found
    return sorted(scenes, key=lambda s: (s.name, s.ref.part))


@dataclass(frozen=True)
class _Problem:
    kind: str
    example: str
    advice: str


def _located(
    layer: Layer, src: str, address: str, refs: Sequence[ImageRef], opener: Opener
) -> list[Scene] | _Problem:
    name = relative_name(address, src)
    try:
        with opener(layer.name, address) as file:
            images = [(ref, file.image(ref)) for of in refs for ref in file.images(of)]
            return [_scene(layer, name, ref, image) for ref, image in images]
    except _UnusableError as error:
        return _Problem(error.kind, name, error.advice)
    except DatasetError as error:
        return _Problem(f"images of {layer.name} cannot be read", str(error), "")


class _UnusableError(Exception):
    def __init__(self, kind: str, advice: str) -> None:
        super().__init__(kind)
        self.kind, self.advice = kind, advice


def _scene(layer: Layer, name: str, ref: ImageRef, image: Image) -> Scene:
    crs = image.crs or layer.section.crs
    if image.transform is None:
        raise _UnusableError(
            f"images of {layer.name} do not say where they lie (no transform)",
            "georeference them, or leave out grid to take every image as a tile",
        )
    if not crs:
        raise _UnusableError(
            f"images of {layer.name} have no coordinate system",
            f"set {layer.name}.crs, for example to EPSG:32631",
        )
    a, b, _, d, e, _ = image.transform
    if not all(map(math.isfinite, image.transform)) or a * e - b * d == 0:
        raise _UnusableError(f"images of {layer.name} have an invalid transform", "georeference them again")
    system = parse_crs(crs, name)
    if not is_on_earth(system):
        raise _UnusableError(
            f"images of {layer.name} are in a local coordinate system",
            "which says nothing of where on Earth they lie: georeference them",
        )
    place = Placement(system, image.transform, image.width, image.height)
    date = image.date if ref.date is None else ref.date
    if date is None and layer.section.is_dated_by_name:
        raise _UnusableError(
            f"images of {layer.name} have a date in their name that is not in the calendar", "fix the name"
        )
    block = tuple(getattr(image, "block", None) or (1, 1))
    return Scene(
        layer.name,
        replace(ref, date=date),
        name,
        place,
        np.dtype(image.dtype).name,
        Box(0, 0, 0, 0),
        (block[0], block[1]),
    )


def relative_name(address: str, src: str) -> str:
    """An address below the source, as it is called on any machine."""
    prefix = src.rstrip("/") + "/"
    return address.removeprefix(prefix)


def common_crs(given: str | None, scenes: Sequence[Scene]) -> str:
    """The CRS of the grid: the given one, else that of the scenes, which then must be the same for all.

    DatasetError if they differ, or if it is not in metres on the ground.
    """
    if given is not None:
        crs = parse_crs(given, "grid.crs")
    else:
        counts = Counter(s.place.crs for s in scenes)
        ordered = sorted(counts, key=lambda c: (-counts[c], c))
        if len(ordered) > 1:
            other = next(s for s in scenes if s.place.crs == ordered[1])
            raise DatasetError(
                f"grid.crs: is not given, and the images have {len(ordered)} coordinate systems: "
                f"{_short(ordered[0])} ({counts[ordered[0]]} images) and others in "
                f"{len(scenes) - counts[ordered[0]]}, the first: {other.name} ({_short(other.place.crs)}); set "
                "grid.crs to the one to cut them in",
                "CRS differ",
            )
        crs = ordered[0]
    check_metric(crs, _centres(scenes))
    return crs


def pixel_phase(scenes: Iterable[Scene], crs: str, resolution_m: float) -> tuple[float, float]:
    """The corner of a lattice of pixels, from 0 to below a pixel: that of most scenes that are in ``crs``.

    Cells that begin there have the pixels of these scenes, which then are copied, not resampled.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for scene in scenes:
        a, b, c, d, e, f = scene.place.transform
        same_size = (
            abs(a - resolution_m) < 1e-6 * resolution_m and abs(-e - resolution_m) < 1e-6 * resolution_m
        )
        if scene.place.crs == crs and not b and not d and same_size:
            counts[_phase(c, resolution_m), _phase(f, resolution_m)] += 1
    return min(counts, key=lambda p: (-counts[p], p)) if counts else (0.0, 0.0)


def _phase(coordinate: float, resolution_m: float) -> float:
    phase = round(coordinate % resolution_m, _LATTICE_DECIMALS)
    return 0.0 if min(phase, resolution_m - phase) < 1e-3 * resolution_m else phase


def placed(scenes: Iterable[Scene], crs: str, problems: Problems) -> list[Scene]:
    """The scenes with their bounds in the CRS of the grid. Adds to ``problems`` those outside of its domain."""
    result = []
    for scene in scenes:
        points = outline(scene.place, crs)
        if not np.isfinite(points).all():
            problems.add(
                f"images of {scene.layer} lie where grid.crs is not defined",
                f"{scene.name} ({_short(scene.place.crs)})",
                f"choose another system than {_short(crs)}",
            )
            continue
        (west, south), (east, north) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        # Corners of files in the same CRS are exact to micrometres, so that cells at the edge are not lost.
        digits = (round(v, _LATTICE_DECIMALS) for v in (west, south, east, north))
        result.append(replace(scene, box=Box(*digits)))
    return result


def outline(place: Placement, crs: str) -> np.ndarray:
    """(N, 2) points along the edges of an image, in ``crs``; not finite where they cannot be transformed."""
    a, b, c, d, e, f = place.transform
    t = np.linspace(0, 1, _EDGE_POINTS)
    zero, one = np.zeros_like(t), np.ones_like(t)
    cols = np.concatenate([t, one, t[::-1], zero]) * place.width
    rows = np.concatenate([zero, t, one, t[::-1]]) * place.height
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    if place.crs != crs:
        x, y = transformer(place.crs, crs).transform(x, y)
    return np.stack([x, y], axis=1)


def shots(
    bands: Sequence[Scene], masks: Mapping[str, Sequence[Scene]], num_bands: int, problems: Problems
) -> list[Shot]:
    """The images of a raster that were taken together, with their masks.

    Together are images with the same key, date and other names of the pattern, and where a band occurs again, as where
    ``*`` stands for the tile, the same place. Adds to ``problems`` images that lack a band or a mask.
    """
    groups: dict[tuple, list[Scene]] = {}
    for scene in bands:
        groups.setdefault(_identity(scene.ref), []).append(scene)
    found = {name: _MaskIndex(scenes) for name, scenes in masks.items()}
    result = []
    for group in (part for of_names in groups.values() for part in _by_place(of_names)):
        first = group[0]
        missing = set(range(num_bands)) - {band for scene in group for band in scene.ref.bands}
        if missing:
            problems.add(
                f"images of {first.layer} lack some of their bands",
                f"{first.name} (band {min(missing) + 1} of {num_bands})",
                "add the files",
            )
            continue
        of_masks = {name: index.find(first) for name, index in found.items()}
        lacking = [name for name, scene in of_masks.items() if scene is None]
        for name in lacking:
            problems.add(f"images of {first.layer} lack the mask {name}", first.name, "add the files")
        if not lacking:
            known = {name: scene for name, scene in of_masks.items() if scene is not None}
            result.append(Shot(first.name, first.ref.date, tuple(group), known))
    return result


def _identity(ref: ImageRef) -> tuple:
    return ref.key, ref.date, ref.names, ref.part


def _by_place(scenes: Sequence[Scene]) -> list[list[Scene]]:
    """Scenes of the same names as images, which have a band once: all of one, or else those of each place. Of several
    of a place, the n-th scenes with each band are one."""
    bands = [band for scene in scenes for band in scene.ref.bands]
    if len(set(bands)) == len(bands):
        return [list(scenes)]
    seen: Counter[tuple] = Counter()
    parts: dict[tuple, list[Scene]] = {}
    for scene in scenes:
        place = tuple(round(side_m) for side_m in scene.box)
        parts.setdefault((place, seen[place, scene.ref.bands]), []).append(scene)
        seen[place, scene.ref.bands] += 1
    return list(parts.values())


def _common_area(a: Box, b: Box) -> float:
    width, height = min(a.east, b.east) - max(a.west, b.west), min(a.north, b.north) - max(a.south, b.south)
    return max(width, 0.0) * max(height, 0.0)


class _MaskIndex:
    """Finds the mask of an image: by key, date, and those other names that both patterns have; of several, the one that
    covers most of it."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._scenes = scenes
        self._names = {name for scene in scenes[:1] for name, _ in scene.ref.names}
        self._dated = any(scene.ref.date is not None for scene in scenes)
        self._keyed = any(scene.ref.key is not None for scene in scenes)
        self._tables: dict[frozenset[str], dict[tuple, list[Scene]]] = {}

    def find(self, image: Scene) -> Scene | None:
        """The mask; None if there is none."""
        ref = image.ref
        common = frozenset(name for name, _ in ref.names) & self._names
        if common not in self._tables:
            table: dict[tuple, list[Scene]] = {}
            for scene in self._scenes:
                table.setdefault(self._key(scene.ref, common), []).append(scene)
            self._tables[common] = table
        masks = self._tables[common].get(self._key(ref, common), [])
        return max(masks, key=lambda mask: _common_area(mask.box, image.box), default=None)

    def _key(self, ref: ImageRef, names: frozenset[str]) -> tuple:
        date: Date | None = ref.date if self._dated else None
        names_of = tuple(n for n in ref.names if n[0] in names)
        # Numbers are the same image of several arrays; texts are names of files, which differ.
        numbers = tuple(p for p in ref.part if isinstance(p, int))
        return ref.key if self._keyed else None, date, names_of, numbers


def _centres(scenes: Sequence[Scene]) -> np.ndarray:
    """(N, 2) longitude and latitude of the centres of scenes; not finite where they cannot be transformed."""
    found = np.empty((len(scenes), 2))
    for crs in {s.place.crs for s in scenes}:
        mine = [i for i, s in enumerate(scenes) if s.place.crs == crs]
        points = np.array([_centre(scenes[i].place) for i in mine])
        found[mine] = np.stack(transformer(crs, LON_LAT).transform(*points.T), axis=1)
    return found


def _centre(place: Placement) -> tuple[float, float]:
    a, b, c, d, e, f = place.transform
    col, row = place.width / 2, place.height / 2
    return a * col + b * row + c, d * col + e * row + f


def _short(crs: str) -> str:
    if crs.startswith("EPSG:"):
        return crs
    from pyproj import CRS

    return str(CRS.from_user_input(crs).name)
