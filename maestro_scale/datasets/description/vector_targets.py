"""Targets from vector files: features with a label in a column, rasterised over a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maestro_scale.datasets.description.assemble import Place
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.description.targets import Labels
from maestro_scale.datasets.description.vectors import Features, VectorFile, burn
from maestro_scale.datasets.scenes.grid import Box, parse_crs
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import MISSING_CLASS, DatasetError, Target

_PIXELS = 100  # per side of a tile, on which shares and majorities are measured without a resolution_m
_UNLABELLED = 255


@dataclass
class VectorLabels:
    """Reads one target of a tile from a vector file. Picklable: what is read stays in the process.

    ``files``: of several tiles, or one per tile, by the pattern of the description.
    """

    target: Target
    keys: TargetKeys
    src: str
    tile_m: float
    _files: dict[tuple[str, str], VectorFile] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.keys.vector is not None
        if not self._per_tile:
            self._open("", "EPSG:4326")  # a wrong column is told at once, not by the first tile

    def __call__(self, key: str, place: Place | None, notes: list[str]) -> np.ndarray:
        """The target of a tile; DatasetError that names file and cause."""
        if place is None:
            raise DatasetError(
                f"tile {key}: its files do not say where it lies, so {self.target.name} cannot be rasterised; "
                "georeference them",
                "no place on the ground",
            )
        if not place.is_metric:
            raise DatasetError(
                f"{place.address}: its coordinates ({place.crs[:30]}) are not metres on the ground, so "
                f"{self.target.name} cannot be rasterised; warp it to a UTM zone (gdalwarp), or cut tiles with grid",
                "not in metres",
            )
        box = Box(place.west, place.north - self.tile_m, place.west + self.tile_m, place.north)
        file = self._open(key, parse_crs(place.crs, place.address))
        found = file.within(box)
        if self.target.kind == "regression":
            return self._numbers(found, box, file.address)
        return self._classes(found, box, file.address, notes)

    def check_overlap(self, crs: str, box: Box) -> None:
        """DatasetError if no feature lies near ``box``, the extent of all tiles: no tile would have a label."""
        if self._per_tile:
            return
        file = self._open("", crs)
        if not file.reaches(box):
            raise DatasetError(
                f"{file.address}: no feature lies where the images are, so {self.target.name} would have no labels; "
                f"check the file and its coordinate system ({file.file_crs[:30]}), or leave the target out"
            )

    def prepare(self, crs: str, box: Box) -> None:
        """Read the features of a box, whose parts are needed next."""
        if not self._per_tile:
            self._open("", crs).prepare(box)

    @property
    def _per_tile(self) -> bool:
        return "{key}" in self._vector.files

    @property
    def _vector(self) -> Any:
        return self.keys.vector

    def _open(self, key: str, crs: str) -> VectorFile:
        name = self._vector.files.replace("{key}", key)
        if (name, crs) not in self._files:
            if self._per_tile:
                self._files.clear()
            keys = self._vector
            self._files[name, crs] = VectorFile(
                remote.join(self.src, name),
                crs,
                layer=keys.layer,
                column=keys.column,
                order=keys.order,
                file_crs=keys.crs,
            )
        return self._files[name, crs]

    def _size(self) -> int:
        resolution_m = self.keys.resolution_m
        return _PIXELS if resolution_m is None else round(self.tile_m / resolution_m)

    def _numbers(self, found: Features, box: Box, where: str) -> np.ndarray:
        features, values = _numbers_of(found, where)
        touched = self._vector.all_touched
        size = self._size()
        numbers = burn(
            features, values, box, size, outside=math.nan, all_touched=touched, dtype="float32"
        ) * np.float32(self.keys.scale)
        if self.target.is_map:
            return numbers
        known = numbers[~np.isnan(numbers)]
        mean = known.mean(dtype=np.float64) if known.size else math.nan
        return np.array([mean], np.float32)

    def _classes(self, found: Features, box: Box, where: str, notes: list[str]) -> np.ndarray:
        features, indices = self._labelled(found, where)
        touched = self._vector.all_touched
        labels = burn(
            features,
            indices,
            box,
            self._size(),
            outside=self._outside(),
            all_touched=touched,
            dtype="uint8",
        )
        if self.target.kind == "segmentation":
            return self._map(labels, where, notes)
        counts = np.bincount(labels.reshape(-1), minlength=_UNLABELLED + 1)[: len(self.target.classes)]
        if self.target.kind == "multilabel":
            return (counts / labels.size).astype(np.float32)
        counts[list(self.target.ignored)] = 0
        return np.array([counts.argmax() if counts.any() else MISSING_CLASS], np.int16)

    def _map(self, labels: np.ndarray, where: str, notes: list[str]) -> np.ndarray:
        unlabelled = labels == _UNLABELLED
        if not unlabelled.any():
            return labels
        if not self.target.ignored:
            raise DatasetError(
                f"{where}: {int(unlabelled.sum())} pixels lie outside of all features, and {self.target.name} has no "
                f"class for them; set targets.{self.target.name}.outside, or add an ignored class",
                "pixels without a label",
            )
        notes.append(f"{self.target.name} has pixels without a label: stored as ignored")
        labels[unlabelled] = self.target.ignored[0]
        return labels

    def _outside(self) -> int:
        if self.keys.outside is None:
            return _UNLABELLED
        return self.target.classes.index(self.keys.outside)

    def _labelled(self, found: Features, where: str) -> tuple[Features, np.ndarray]:
        """The features that have a class, and their indices (N,) uint8."""
        if found.labels is None:
            others = [i for i, name in enumerate(self.target.classes) if name != self.keys.outside]
            return found, np.full(len(found), others[0], np.uint8)
        labels = Labels.of(self.target, self.keys)
        known: dict[str, int] = {}
        indices = np.empty(len(found), np.int16)
        for i, label in enumerate(found.labels.tolist()):
            text = label_text(label)
            if text not in known:
                known[text] = labels.class_of(text, where)
            indices[i] = known[text]
        keep = indices != MISSING_CLASS
        return found.selected(keep), indices[keep].astype(np.uint8)


def label_text(label: Any) -> str:
    """A label as text, whole numbers without a decimal point; empty for a missing one."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def _numbers_of(features: Features, where: str) -> tuple[Features, np.ndarray]:
    """The features whose label is a number, and the numbers (N,) float32. DatasetError for a label that is none."""
    labels: Sequence[Any] = [] if features.labels is None else features.labels.tolist()
    try:
        values = np.array([math.nan if v is None else float(v) for v in labels], np.float32)
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{where}: has a label that is not a number ({error}); choose another column", "not a number"
        ) from None
    keep = ~np.isnan(values)
    return features.selected(keep), values[keep]
