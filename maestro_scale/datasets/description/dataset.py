"""A described dataset as a raw dataset: random access to the tiles of one split, from files on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from maestro_scale.datasets.description import splits
from maestro_scale.datasets.description.assemble import (
    NOT_ALIGNED,
    Stack,
    check_aligned,
    match_images,
    read_stack,
    stored,
)
from maestro_scale.datasets.description.blocks import tiles_of_split
from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.index import SectionImages, keys_of, list_sections
from maestro_scale.datasets.description.sections.rasters import Raster
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.description.spec import dataset_spec, settings_of
from maestro_scale.datasets.description.targets import TableLabels, TargetReader
from maestro_scale.datasets.description.tile import MaskImages, RasterImages, make_tile, origin_of
from maestro_scale.datasets.description.vector_targets import VectorLabels
from maestro_scale.datasets.fill import NOTHING_VALID
from maestro_scale.datasets.scenes.dataset import open_scenes
from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, RawDataset, Tile
from maestro_scale.errors import shorten


def open_described(
    description: Description, src: str, split: str, modalities: Sequence[str] | None = None
) -> RawDataset:
    """Split ``split`` of the described dataset below ``src`` (folder or address); ``modalities``: None for all.

    Lists the files, and opens none of tiles. Raises DatasetError (one line) if the description and what is there do not
    go together at all: no file that matches, no such split, a table without these tiles. What concerns single tiles is
    raised when they are read.
    """
    description = only(description, modalities)
    if description.grid is not None:
        return open_scenes(description, src, split)
    spec = dataset_spec(description)
    images = list_sections(description, src, split)
    rasters = [images[f"rasters.{m.name}"] for m in spec.modalities]
    by_folder = any("{split}" in (s.section.files or "") for s in images.values())
    keys, listing = splits.select(description.splits, src, split, keys_of(rasters), by_folder)
    num_left_out: dict[str, int] = {}
    if not by_folder and description.splits.blocks is not None:
        keys, num_left_out = tiles_of_split(description.splits.blocks, split, keys, rasters, description)
    _check_complete(description, keys, images, listing)
    wanted = set(keys)
    images = {where: _only(found, wanted) for where, found in images.items()}
    tables = {
        t.name: TableLabels.load(t, target_keys(description)[t.name], src, keys)
        for t in spec.targets
        if target_keys(description)[t.name].table is not None
    }
    labels = {
        t.name: images[f"targets.{t.name}.raster"]
        for t in spec.targets
        if f"targets.{t.name}.raster" in images
    }
    vectors = {
        t.name: VectorLabels(t, target_keys(description)[t.name], src, spec.tile_m)
        for t in spec.targets
        if target_keys(description)[t.name].vector is not None
    }
    targets = TargetReader(spec, target_keys(description), labels, tables, vectors)
    return DescribedTiles(description, spec, tuple(keys), images, targets, num_left_out)


def only(description: Description, names: Sequence[str] | None) -> Description:
    """The description with these rasters only; DatasetError for a name that it does not have."""
    if names is None:
        return description
    dataset_spec(description).select(names)  # says what is wrong with the names
    kept = {n: r for n, r in description.rasters.items() if n in names}
    sensors = {n: s for n, s in description.sensors.items() if s.source in names}
    used = {*(n for n, r in kept.items() if r is not None and r.sensor is not None), *sensors}
    return description.model_copy(
        update={
            "rasters": kept,
            "sensors": sensors,
            "ref_sensor": description.ref_sensor if description.ref_sensor in used else None,
        }
    )


def target_keys(description: Description) -> Mapping[str, TargetKeys]:
    """The targets of a description, without those that are left out."""
    return {name: keys for name, keys in description.targets.items() if keys is not None}


@dataclass
class DescribedTiles:
    """Tiles of which each is an image of every raster and date (a :class:`~maestro_scale.datasets.spec.RawDataset`).

    ``images``: by section of the description. ``left_out``: numbers of tiles in no split, by reason.
    """

    description: Description
    spec: DatasetSpec
    listed: tuple[str, ...]
    images: Mapping[str, SectionImages]
    targets: TargetReader
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """As of :class:`~maestro_scale.datasets.spec.RawDataset`."""
        return settings_of(self.description)

    def keys(self) -> list[str]:
        """Sorted tile keys."""
        return list(self.listed)

    def absent(self, key: str) -> tuple[str, ...]:
        """The rasters that a tile lacks, of those that are not required. DatasetError as :meth:`read`."""
        lacking = []
        for modality in self.spec.modalities:
            section = self.images[f"rasters.{modality.name}"]
            if modality.optional and (
                key not in section.by_key or not self._has_values(modality, section, key)
            ):
                lacking.append(modality.name)
        return tuple(lacking)

    def _has_values(self, modality: Modality, section: SectionImages, key: str) -> bool:
        """Whether anything of a raster is measured in a tile: an array of many tiles has pixels for each of them."""
        if "key" not in (section.section.axes or ()):
            return True
        raster = _raster(self.description, modality.name)
        stack = read_stack(section, key, modality.size, modality.resolution_m)
        undated = np.zeros((len(stack.values), 3), np.int16)
        mask = np.zeros((len(stack.values), len(modality.mask_bands), *stack.values.shape[2:]), np.uint8)
        try:
            stored(raster, modality, stack, undated, mask if modality.mask_bands else None, [])
        except DatasetError as error:
            if error.kind not in NOTHING_VALID:
                raise
            return False
        return True

    def read(self, key: str) -> Tile:
        """One tile; DatasetError that names file and cause."""
        notes: list[str] = []
        found: dict[str, RasterImages] = {}
        for modality in self.spec.modalities:
            section = self.images[f"rasters.{modality.name}"]
            if key in section.by_key or not modality.optional:
                found[modality.name] = self._raster_images(modality, section, key, notes)
        if not found:
            raise DatasetError(
                f"tile {key} has no file of any raster; remove it from the list", "a file is missing"
            )
        places = [(n, i.stack.place) for n, i in found.items() if i.stack.place is not None]
        labels, label_places = self.targets.read(
            key, self._names(key), places[0][1] if places else None, notes
        )
        everywhere = [(n, p) for n, p in (*places, *label_places) if p is not None]
        if check_aligned(everywhere) > NOT_ALIGNED:
            notes.append("rasters begin at different corners, less than a pixel apart: taken as aligned")
        if not everywhere:
            notes.append("no file says where the tile lies: stored without origin")
        else:
            unplaced = [name for name, images in found.items() if images.stack.place is None]
            notes += [f"{name} has files without coordinates: taken as aligned" for name in unplaced]
        origin = origin_of(self.description, dict(everywhere), notes)
        return make_tile(self.description, self.spec, key, found, labels, origin, notes)

    def _raster_images(
        self, modality: Modality, section: SectionImages, key: str, notes: list[str]
    ) -> RasterImages:
        stack = read_stack(section, key, modality.size, modality.resolution_m)
        if stack.apart > NOT_ALIGNED:
            notes.append(f"{modality.name} has images that begin less than a pixel apart: taken as aligned")
        masks = {}
        for name in _raster(self.description, modality.name).masks:
            of_mask = self.images[f"{section.where}.masks.{name}"]
            found = read_stack(of_mask, key, modality.size, None, coarser=True)
            if stack.place is not None and found.place is not None:
                check_aligned([(modality.name, stack.place), (f"its mask {name}", found.place)])
            masks[name] = _mask_images(stack, found, name)
        return RasterImages(stack, masks)

    def _names(self, key: str) -> dict[str, str]:
        """The names in the patterns of the rasters, with their text in the first file of the tile."""
        names: dict[str, str] = {}
        for modality in self.spec.modalities:
            for ref in self.images[f"rasters.{modality.name}"].by_key.get(key, ())[:1]:
                names = {**dict(ref.names), **names}
        return names


def _mask_images(stack: Stack, masks: Stack, name: str) -> MaskImages:
    order = match_images(stack, masks, name)
    return MaskImages(
        masks.values[order, 0], None if masks.invalid is None else masks.invalid[order, 0], masks.address
    )


def _raster(description: Description, name: str) -> Raster:
    raster = description.rasters[name]
    assert raster is not None
    return raster


def _only(images: SectionImages, keys: set[str]) -> SectionImages:
    return replace(images, by_key={k: refs for k, refs in images.by_key.items() if k in keys})


def _check_complete(
    description: Description, keys: Sequence[str], images: Mapping[str, SectionImages], listing: str
) -> None:
    """DatasetError if no tile has a file of a raster, or has it with another raster: then a pattern is wrong."""
    rasters = [
        images[f"rasters.{name}"] for name, raster in description.rasters.items() if raster is not None
    ]
    for raster in rasters:
        if not raster.by_key:
            continue  # it may be missing, as the description says
        own = [key for key in keys if key in raster.by_key]
        others = [r for r in rasters if r is not raster and r.by_key]
        first = next(iter(sorted(raster.by_key)), "")
        if not own:
            raise DatasetError(
                f"{raster.where}.files: {raster.section.files} has none of the {len(keys)} tiles of {listing}, first "
                f"{shorten(keys[0])}, but {shorten(first)}; the {{key}} of all patterns must be the same text"
            )
        if others and not any(key in other.by_key for other in others for key in own):
            there = next(iter(sorted(others[0].by_key)))
            raise DatasetError(
                f"{raster.where}.files: no tile has both {raster.section.files} (first {shorten(own[0])}) and "
                f"{others[0].section.files} (first {shorten(there)}); the {{key}} of all patterns must be the same text"
            )
