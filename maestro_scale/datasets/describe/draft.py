"""The draft of a description: what was found in a folder, put together and written as YAML with comments."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from maestro_scale.datasets.bands import group_of, is_radar
from maestro_scale.datasets.describe.raster_draft import Note, RasterDraft
from maestro_scale.datasets.describe.sizes import Sizes
from maestro_scale.datasets.describe.yaml_text import Document
from maestro_scale.datasets.spec_limits import module_name_problem, name_problem


@dataclass
class TargetDraft:
    """A target: its fields in the order of the YAML, and notes by field."""

    name: str
    fields: dict[str, object]
    found: str
    notes: dict[str, Note] = field(default_factory=dict)


@dataclass
class Draft:
    """All of a description. ``grid``: None for tiles that are files. ``splits``: fields, or None for one split.

    ``blocks``: fields of a proposal for ``splits.blocks``, written as a comment where splits is None. ``remarks``: what
    else was found, such as files that are not used. ``messages``: for standard error.
    """

    name: str
    source: str
    header: str
    rasters: list[RasterDraft]
    sizes: Sizes
    targets: list[TargetDraft] = field(default_factory=list)
    grid: dict[str, object] | None = None
    grid_notes: dict[str, Note] = field(default_factory=dict)
    splits: dict[str, object] | None = None
    splits_note: str = ""
    blocks: dict[str, object] | None = None
    num_tiles: int | None = None
    remarks: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def to_yaml(self) -> str:
        """The description, with comments."""
        doc = Document()
        doc.comment(f"A first draft, by: maestro-scale describe {self.source}")
        doc.comment(self.header)
        doc.comment(
            'Lines with "assumed" are guesses: check these first. All keys are listed in docs/description.md.'
        )
        for remark in self.remarks:
            doc.comment(remark)
        doc.blank()
        doc.put(0, "name", self.name, "assumed: the folder's name; recipes call the dataset by it")
        self._write_sizes(doc)
        if self.grid is not None:
            doc.put(0, "grid", None, "cut all rasters on one grid")
            for key, value in self.grid.items():
                doc.put(2, key, value, _text(self.grid_notes.get(key)))
        doc.put(0, "rasters")
        for raster in self.rasters:
            self._write_raster(doc, raster)
        if self.targets:
            doc.put(0, "targets")
            for target in self.targets:
                doc.put(2, target.name)
                doc.comment(f"found: {target.found}", 4)
                for key, value in target.fields.items():
                    doc.put(4, key, value, _text(target.notes.get(key)))
        self._write_splits(doc)
        return str(doc)

    def _write_sizes(self, doc: Document) -> None:
        s = self.sizes
        per_raster = ", ".join(
            f"{r.name} {z.tokens}" + (f" ({z.num_dates} dates)" if z.num_dates > 1 else "")
            for r, z in zip(self.rasters, s.rasters, strict=True)
        )
        tokens = f"{s.tokens} tokens a sample: {per_raster}"
        if self.grid is None:
            doc.put(
                0,
                "tile_m",
                s.tile_m,
                "metres; the extent of the files" + ("" if s.crop_m < s.tile_m else f"; {tokens}"),
            )
        else:
            many = "" if self.num_tiles is None else f"; about {self.num_tiles} tiles"
            doc.put(
                0,
                "tile_m",
                s.tile_m,
                f"assumed: metres, a side of a tile{many}; {tokens}; larger: more of each",
            )
        if s.crop_m < s.tile_m:
            doc.put(
                0, "crop_m", s.crop_m, f"assumed: metres, a sample is cut from a tile at random; {tokens}"
            )

    def _write_raster(self, doc: Document, r: RasterDraft) -> None:
        sized = self.sizes.rasters[self.rasters.index(r)]
        notes = {key: _text(note) for key, note in r.notes.items()}
        doc.put(2, r.name)
        doc.comment(f"found: {r.found}", 4)
        doc.put(4, "files", r.files, notes.get("files", ""))
        for key, value in (("source", r.source), ("key", r.key), ("variable", r.variable), ("axes", r.axes)):
            if value is not None:
                doc.put(4, key, value, notes.get(key, ""))
        if r.key_source is not None:
            doc.put(4, "keys", r.key_source, notes.get("keys", ""))
        if r.exclude:
            doc.put(4, "exclude", r.exclude, "other files that match the pattern")
        in_order = [source for _, source in r.bands] == list(range(1, r.num_bands + 1))
        plain = in_order or all(name == source for name, source in r.bands)
        bands = [name if plain else {"name": name, "from": source} for name, source in r.bands]
        doc.put(4, "bands", bands, notes.get("bands", ""))
        resolution = notes.get("resolution_m", "")
        if sized.resolution_m != r.resolution_m:
            resolution = (
                f"assumed: near the files' {r.resolution_m:g} m; a whole number of pixels fits into a tile"
            )
            if sized.resolution_m > 1.5 * r.resolution_m:
                resolution = (
                    f"assumed: coarser than the files' {r.resolution_m:g} m, as a tile also holds six pixels of the "
                    "coarsest raster"
                )
        doc.put(4, "resolution_m", sized.resolution_m, resolution)
        doc.put(4, "dtype", r.dtype, notes.get("dtype", ""))
        if r.series:
            doc.put(4, "series", True, "several dates of one place")
        if r.dates is not None:
            doc.put(4, "dates", r.dates, notes.get("dates", ""))
        if r.nodata or "nodata" in notes:
            doc.put(4, "nodata", list(r.nodata), notes.get("nodata", ""))
        if r.scale != 1.0:
            doc.put(4, "scale", r.scale, notes.get("scale", ""))
        if r.offset or "offset" in notes:
            doc.put(4, "offset", r.offset, notes.get("offset", ""))
        if r.masks:
            doc.put(4, "masks")
            for name, mask in r.masks.items():
                doc.put(6, name, mask.rule, _text(mask.note))
        doc.put(4, "quantity", r.quantity, notes.get("quantity", ""))
        if self.grid is not None:
            resampling = "average" if sized.resolution_m > 2 * r.resolution_m else r.resampling
            doc.put(4, "resampling", resampling, "assumed: nearest keeps values, cubic keeps contrast")
        if not r.required:
            doc.put(4, "required", False, notes.get("required", ""))
        self._write_sensor(doc, r)

    def _write_sensor(self, doc: Document, r: RasterDraft) -> None:
        sized = self.sizes.rasters[self.rasters.index(r)]
        sensor: dict[str, object] = {"patch": sized.patch}
        if r.series:
            sensor["num_dates"] = sized.num_dates
        if groups := band_groups([name for name, _ in r.bands]):
            sensor["band_groups"] = groups
        if r.divisor is not None:
            sensor["scale"] = {"divisor": r.divisor}
        if r.elevation:
            sensor["elevation"] = True
        text = f"assumed: a token is {sized.patch} pixels ({sized.patch * sized.resolution_m:g} m) a side"
        text += f", a sample has {sized.num_dates} dates" if r.series else ""
        text += ", like bands are groups" if "band_groups" in sensor else ""
        text += ", inputs are values / divisor" if r.divisor is not None else ""
        doc.put(4, "sensor", sensor, text)

    def _write_splits(self, doc: Document) -> None:
        if self.splits is not None:
            doc.put(0, "splits", self.splits, self.splits_note)
            return
        doc.comment(self.splits_note or "assumed: no splits were found, so all tiles are in the split train.")
        if self.blocks is not None:
            doc.comment(
                "To draw train, val and test by blocks of ground, so that test tiles do not lie among train tiles:"
            )
            proposal = Document()
            proposal.put(0, "splits", {"blocks": self.blocks})
            doc.comment(str(proposal).strip())


def band_groups(bands: Sequence[str]) -> list[int]:
    """Numbers of consecutive bands of one kind, as the presets normalise targets over; empty if that is one group.

    Visible, near-infrared and short-wave infrared bands; radar polarisations are groups of their own.
    """
    if is_radar(tuple(bands)):
        return [1] * len(bands) if len(bands) > 1 else []
    kinds = [group_of(band) for band in bands]
    sizes = [len(list(same)) for _, same in groupby(kinds)]
    return sizes if None not in kinds and 1 < len(sizes) <= 4 else []


def dataset_name(src: str) -> str:
    """The name of a dataset in this folder or at this address."""
    last = src.rpartition("/")[2] if "://" in src else Path(src).resolve().name
    name = re.sub(r"[^A-Za-z0-9]+", "_", last).strip("_").lower()
    return name[:60] or "dataset"


def unique_name(name: str, taken: Sequence[str]) -> str:
    """``name``, or with a number behind it if it is taken."""
    name = re.sub(r"[^A-Za-z0-9_\-]+", "_", name).strip("_-")[:60] or "raster"
    if name_problem(name) or module_name_problem(name):
        name = f"{name}_1"  # of a field of shards, or of a part of torch's modules
    if name not in taken:
        return name
    return next(f"{name}_{i}" for i in range(2, len(taken) + 3) if f"{name}_{i}" not in taken)


def class_fields(
    values: Mapping[str, int], is_text: bool, names: Mapping[int, str] | None = None
) -> dict[str, object]:
    """``classes`` and, where labels are not the indices of classes or their names, ``values``."""
    if is_text:
        return {"classes": list(values)}
    numbers = [int(v) for v in values]
    called = [(names or {}).get(n, f"class_{n}") for n in numbers]
    if numbers == list(range(len(numbers))):
        return {"classes": called}
    return {"classes": called, "values": dict(zip(map(str, numbers), called, strict=True))}


def counts_text(values: Mapping[str, int], most: int = 6) -> str:
    """How often the most frequent values occur."""
    common = Counter(values).most_common(most)
    rest = len(values) - len(common)
    return ", ".join(f"{v} {n}" for v, n in common) + (f" and {rest} more" if rest else "")


def count_text(count: int, what: str) -> str:
    """``3 files``, ``1 file``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _text(note: Note | None) -> str:
    if note is None:
        return ""
    return f"assumed: {note.text}" if note.assumed else note.text
