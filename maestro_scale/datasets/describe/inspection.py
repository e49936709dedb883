"""Inspects a folder: groups its files, opens some of them, and puts together the draft of a description."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from maestro_scale.datasets.describe import labels, words
from maestro_scale.datasets.describe.arrays import LabelArray, draft_arrays
from maestro_scale.datasets.describe.draft import (
    Draft,
    TargetDraft,
    class_fields,
    counts_text,
    dataset_name,
    unique_name,
)
from maestro_scale.datasets.describe.files import Listing, list_source, local_copy
from maestro_scale.datasets.describe.names import Family, families
from maestro_scale.datasets.describe.probe import SUFFIXES, Prober, Values
from maestro_scale.datasets.describe.rasters import (
    Note,
    RasterDraft,
    attach_mask,
    draft_raster,
    merge_resolutions,
    sensor_of,
)
from maestro_scale.datasets.describe.sizes import Input, Sizes, sizes_of_scenes, sizes_of_tiles
from maestro_scale.datasets.describe.stac_items import draft_items
from maestro_scale.datasets.describe.tars import TarTexts, read_texts
from maestro_scale.datasets.describe.units import Unit, lon_lat, unit_of
from maestro_scale.datasets.description.patterns import Pattern
from maestro_scale.datasets.scenes.ground import utm_crs
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError

_T = TypeVar("_T")

_SCENE_SIDE = 1500  # pixels: larger images are no tiles
_FEW_PLACES, _FEW_SIDE = 50, 200  # nor are a few images of at least this side
_MAX_LABELS = 64
_LABEL_PIXELS = 256  # of a label map, per side of a tile
_BLOCKS = 40  # wanted number of blocks, of which splits are drawn
_ORDER = ("aerial", "naip", "spot", "planet", "s2", "", "landsat", "s1", "dem")
"""Of rasters by the begin of their names: the first one gives the grid; empty: all others."""
_METADATA = re.compile(
    r"mtd|meta|dates|index|tiles|grid|split", re.IGNORECASE
)  # names of vector files without labels
_WORLDCOVER = {
    10: "tree_cover", 20: "shrubland", 30: "grassland", 40: "cropland", 50: "built_up", 60: "bare_or_sparse",
    70: "snow_and_ice", 80: "water", 90: "wetland", 95: "mangroves", 100: "moss_and_lichen",
}  # fmt: skip
"""Legend of ESA WorldCover (worldcover2021.esa.int, product user manual)."""


class Inspection:
    """What a folder holds. ``blocks``: propose splits by blocks of ground as part of the description."""

    def __init__(self, src: str, blocks: bool = False) -> None:
        self._listing = list_source(src)
        self._src, self._blocks = self._listing.src, blocks
        self._prober = Prober(self._src)
        self._remarks: list[str] = []
        self._messages: list[str] = []
        self._targets: list[TargetDraft] = []

    def draft(self) -> Draft:
        """The draft; DatasetError (one line) if there is nothing that could be described."""
        listing = self._listing
        rasters = self._rasters(listing)
        arrays = draft_arrays(self._src, listing.paths)
        rasters += arrays.rasters
        self._messages += arrays.messages
        self._used = set(arrays.used)
        if not rasters:
            rasters = self._stac(listing)
        if not rasters:
            raise DatasetError(self._nothing(listing))
        rasters.sort(key=lambda r: _ORDER.index(name) if (name := r.name.split("_")[0]) in _ORDER else 5)
        is_scenes = self._are_scenes(rasters)
        if is_scenes:
            rasters = merge_resolutions(rasters)
        else:
            for r in rasters:
                self._give_key(r)
        self._exclude(rasters, listing)
        sizes = self._sizes(rasters, is_scenes)
        tars = self._tar_dates(rasters)
        self._give_dates(rasters)
        draft = Draft(
            name=dataset_name(self._src),
            source=self._src,
            header=self._header(listing, rasters, is_scenes),
            rasters=rasters,
            sizes=sizes,
        )
        if is_scenes:
            self._grid(draft)
        self._label_rasters(draft)
        self._label_arrays(draft, arrays.labels)
        self._vectors(draft, listing)
        self._tar_targets(tars)
        self._tables(draft, listing)
        self._class_folders(draft)
        self._propose_splits(draft)
        draft.targets = self._targets
        draft.remarks, draft.messages = self._remarks, self._messages
        return draft

    def _stac(self, listing: Listing) -> list[RasterDraft]:
        """Of the first STAC file, in a folder without images of its own."""
        paths = sorted(
            (p for p in listing.paths if p.lower().endswith(".json")), key=lambda p: (p.count("/"), p)
        )
        for path in paths[:5]:
            try:
                return draft_items(self._src, path, self._prober)
            except DatasetError as error:
                self._messages.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
        return []

    def _read(self, reader: Callable[..., _T | str], path: str, *more: object) -> _T | str:
        """What a reader of :mod:`labels` finds in a file, or why it cannot be read."""
        try:
            return reader(local_copy(self._src, path), path, *more)
        except DatasetError as error:
            return str(error)

    def _list_keys(self, path: str) -> list[str]:
        return labels.list_keys(local_copy(self._src, path))

    def _is_geoparquet(self, path: str) -> bool:
        with remote.open_binary(remote.join(self._src, path)) as file:
            return labels.is_geoparquet(file)

    # Rasters

    def _rasters(self, listing: Listing) -> list[RasterDraft]:
        paths = [p for p in listing.paths if p.lower().endswith(SUFFIXES)]
        rasters: list[RasterDraft] = []
        masks: list[Family] = []
        self._label_families: list[Family] = []
        skipped: list[Family] = []
        for family in families(paths, self._prober.kind):
            role = words.role_of(family.words)
            if role == "mask":
                masks.append(family)
            elif role == "skip":
                skipped.append(family)
            elif role == "label" or (role == "area"):
                self._label_families.append(family)
            else:
                name = self._raster_name(family, [r.name for r in rasters])
                raster = draft_raster(family, self._prober, name)
                if raster is not None:
                    rasters.append(raster)
        if not rasters and self._label_families:  # a folder called masks may hold nothing else
            family = self._label_families.pop(0)
            raster = draft_raster(family, self._prober, self._raster_name(family, []))
            rasters += [raster] if raster is not None else []
        self._attach(masks, rasters)
        for path, reason in sorted(self._prober.unreadable.items()):
            self._messages.append(f"{path}: cannot be read ({reason}); left out")
        if skipped:
            self._remarks.append(
                f"Not used: {', '.join(f.pattern for f in skipped[:6])}{' …' * (len(skipped) > 6)}"
            )
        return self._without_labels(rasters)

    def _raster_name(self, family: Family, taken: Sequence[str]) -> str:
        sensor = sensor_of(family)
        plain = [
            w for w in family.words if re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,20}", w) and not words.is_band(w)
        ]
        return unique_name(sensor or (plain[-1].lower() if plain else "image"), taken)

    def _attach(self, masks: Sequence[Family], rasters: Sequence[RasterDraft]) -> None:
        """Each mask belongs to the raster whose pattern has the most in common with its own."""
        for family in masks:
            dated = [
                r for r in rasters if r.family and bool(r.family.date_format) == bool(family.date_format)
            ]
            if not dated:
                self._remarks.append(f"Not used, since no raster has dates like it: {family.pattern}")
                continue
            sensor = sensor_of(family)
            best = max(
                dated,
                key=lambda r: (
                    r.family is not None and sensor_of(r.family) == sensor,
                    _common(r.files, family.pattern),
                ),
            )
            attach_mask(best, family, self._prober)

    def _without_labels(self, rasters: list[RasterDraft]) -> list[RasterDraft]:
        """Without images of few integers that lie beside images of one date or more: they are labels."""
        kept = []
        for r in rasters:
            family = r.family
            assert family is not None
            values = None
            if (
                len(rasters) > 1
                and len(r.bands) == 1
                and not family.date_format
                and r.dtype.strip("u").startswith("int")
            ):
                values = self._prober.values([f.path for f in family.files], whole=True)
            few = values is not None and values.distinct is not None and 2 <= len(values.distinct) <= 32
            if few and sensor_of(family) is None:
                self._label_families.append(family)
            else:
                kept.append(r)
        return kept or rasters

    def _are_scenes(self, rasters: Sequence[RasterDraft]) -> bool:
        """Whether images are to be cut into tiles, rather than tiles themselves."""
        if any(r.bounds is None for r in rasters):
            return False  # arrays of several places, and images without coordinates
        if not all(r.keys for r in rasters) or any(map(self._is_map, self._label_families)):
            return True  # what names no place shows all of it
        headers = [self._prober.headers([f.path for f in r.family.files]) for r in rasters if r.family]
        sides = [max(h.width, h.height) for some in headers for h in some]
        if max(sides) > _SCENE_SIDE:
            return True
        shapes = [{(h.width, h.height) for h in some} for some in headers]
        squares = all(len(shape) == 1 and len(set(next(iter(shape)))) == 1 for shape in shapes)
        extents = [r.extent_m for r in rasters]
        equal = max(extents) - min(extents) <= max(r.resolution_m for r in rasters)
        places = max(len(r.keys) for r in rasters)
        if not (squares and equal):
            return True
        return places < _FEW_PLACES and max(sides) >= _FEW_SIDE

    def _exclude(self, rasters: Sequence[RasterDraft], listing: Listing) -> None:
        """Where the pattern of a raster also matches files of others, leave those out."""
        for r in rasters:
            family = r.family
            assert family is not None
            own = {f.path for f in family.files}
            if "{band}" in r.files or r.variable is not None or r.source == "stac":
                continue  # bands are listed by name
            pattern = Pattern(r.files, (), r.key)
            others = [p for p in listing.paths if p not in own and pattern.match(p)]
            if others:
                ends = sorted({_ending(p, [f.path for f in family.files]) for p in others})
                r.exclude = tuple(ends[:20])

    def _is_map(self, family: Family) -> bool:
        """Whether the files of a family have coordinates, but no keys."""
        return not family.keys and any(h.bounds for h in self._prober.headers([f.path for f in family.files]))

    def _give_key(self, raster: RasterDraft) -> None:
        """A key for images of one place, whose names say none."""
        several = "key" in (raster.axes or ()) or raster.files.endswith((".parquet", ".tar"))
        if not raster.keys and not several:
            raster.key = dataset_name(self._src)
            raster.assume("key", "nothing names a tile, so all images are of one")

    def _sizes(self, rasters: Sequence[RasterDraft], is_scenes: bool) -> Sizes:
        inputs = [Input(r.resolution_m, r.num_dates if r.series else 1, r.side) for r in rasters]
        if is_scenes:
            return sizes_of_scenes(inputs)
        tile_m = max(r.extent_m for r in rasters)
        return sizes_of_tiles(inputs, round(tile_m, 6))

    def _give_dates(self, rasters: Sequence[RasterDraft]) -> None:
        """Rasters without dates get that of the others, or a constant."""
        dated = [r for r in rasters if r.family is not None and r.family.date_format]
        for r in rasters:
            if r in dated or (r.dates is not None and (dated or r.dates != {"from": "reference"})):
                continue
            days = sorted(f.date for d in dated if d.family for f in d.family.files if f.date)
            day = f"{days[len(days) // 2]:%Y-%m-%d}" if days else "2020-07-01"
            r.dates = {"from": "constant", "date": day}
            r.assume(
                "dates",
                "nothing says when; write the date, or a table: {from: csv, file: dates.csv, column: date}",
            )

    def _header(self, listing: Listing, rasters: Sequence[RasterDraft], is_scenes: bool) -> str:
        suffixes = Counter(Path(p).suffix.lower() or "no suffix" for p in listing.paths)
        counts = ", ".join(
            f"{n} {s}" for s, n in sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))[:6]
        )
        more = "" if listing.complete else f" (of at least {listing.num_seen}: a sample)"
        form = "scenes, which are cut into tiles" if is_scenes else "tiles, each in its own files"
        return f"Found: {_number(len(listing.paths), 'file')}{more}: {counts}. Taken as {form}."

    def _nothing(self, listing: Listing) -> str:
        suffixes = Counter(Path(p).suffix.lower() or "no suffix" for p in listing.paths).most_common(4)
        found = ", ".join(f"{n} {s}" for s, n in suffixes)
        if self._prober.unreadable:
            path, reason = next(iter(sorted(self._prober.unreadable.items())))
            return (
                f"{self._src}: none of {len(self._prober.unreadable)} images can be read, first {path} ({reason}); "
                "fetch them again"
            )
        return (
            f"{self._src}: holds no images that could be described ({found or 'it is empty'}); give a folder with "
            "GeoTIFF, JPEG 2000, PNG, NetCDF, HDF5, Zarr, NumPy, Parquet or tar files, or a STAC file"
        )

    # Grid

    def _grid(self, draft: Draft) -> None:
        rasters = draft.rasters
        metric = [r for r in rasters if r.crs and all(u.is_metre for u in _units(r))]
        crs = Counter(c for r in metric for c in sorted(r.crs)).most_common(1)
        grid: dict[str, object] = {}
        bounds = rasters[0].bounds
        assert bounds is not None
        if crs:
            grid["crs"] = crs[0][0]
            others = sorted({c for r in rasters for c in r.crs} - {crs[0][0]})
            draft.grid_notes["crs"] = (
                Note(f"most files have it, others {', '.join(c[:30] for c in others)}: they are warped", True)
                if others
                else Note("all files have it")
            )
        else:
            grid["crs"] = utm_crs(*lon_lat(sorted(rasters[0].crs)[0], bounds))
            names = " and ".join(sorted({u.name for u in _units(rasters[0])}))
            draft.grid_notes["crs"] = Note(
                f"the files are in {names}; UTM of their middle. Any system in metres on the ground", True
            )
        grid["min_valid"] = 0.5
        draft.grid_notes["min_valid"] = Note("an image must cover half of a tile with valid pixels", True)
        draft.grid = grid
        (west, south, east, north), unit_m = bounds, max(u.ground_m for u in _units(rasters[0]))
        area = (east - west) * (north - south) * unit_m**2
        draft.num_tiles = max(1, int(area / draft.sizes.tile_m**2))
        smallest = min((r.side * r.resolution_m for r in rasters), default=0)
        if smallest < draft.sizes.tile_m:
            draft.remarks.append("")
            self._remarks.append(
                f"The smallest image is {smallest:g} m wide, less than a tile: make tile_m smaller."
            )

    # Labels

    def _label_rasters(self, draft: Draft) -> None:
        for family in self._label_families:
            paths = [f.path for f in family.files]
            headers = self._prober.headers(paths)
            values = self._prober.values(paths, most=16, whole=True)
            if not headers or values is None:
                continue
            plain = [w.lower() for w in family.words if not w.isdigit()]
            name = words.label_of(family.words) or (plain[-1] if plain else "label")
            name = unique_name(name, [t.name for t in self._targets])
            raster: dict[str, object] = {"files": family.pattern}
            if family.key_template or not (family.keys or draft.grid):
                raster["key"] = family.key_template or dataset_name(self._src)
            resolution = headers[0].resolution_m or draft.sizes.tile_m / headers[0].width
            target = TargetDraft(name, {}, "")
            if values.distinct is None or len(values.distinct) > _MAX_LABELS:
                target.fields = {
                    "kind": "regression",
                    "raster": raster,
                    "resolution_m": resolution,
                    "units": "",
                }
                target.notes["kind"] = Note("numbers, since there are many values; write their units", True)
            else:
                target.fields = {"kind": "segmentation", "raster": raster, "resolution_m": resolution}
                self._set_classes(target, values, headers[0].nodata, raster)
            target.found = (
                f"{len(paths)} files, {headers[0].dtype}, {headers[0].width}×{headers[0].height} pixels of "
                f"{resolution:g} m, {_values_text(values)}"
            )
            self._targets.append(target)

    def _label_arrays(self, draft: Draft, found: Sequence[LabelArray]) -> None:
        for label in found:
            array, values = label.array, label.array.values
            if values is None:
                continue
            name = unique_name(label.name, [t.name for t in self._targets])
            if draft.grid is None and any(r.key == dataset_name(self._src) for r in draft.rasters):
                label.where.setdefault("key", dataset_name(self._src))
            resolution = array.resolution_m or draft.sizes.tile_m / array.size("x")
            target = TargetDraft(
                name,
                {"kind": "segmentation", "raster": label.where, "resolution_m": resolution},
                _values_text(values),
            )
            if values.distinct is None or len(values.distinct) > _MAX_LABELS:
                target.fields |= {"kind": "regression", "units": ""}
                target.notes["kind"] = Note("numbers, since there are many values; write their units", True)
            else:
                self._set_classes(target, values, array.nodata, label.where)
            self._targets.append(target)

    def _set_classes(
        self, target: TargetDraft, values: Values, nodata: float | None, raster: dict[str, object]
    ) -> None:
        assert values.distinct is not None
        found = list(values.distinct)
        unlabelled = [v for v in found if v in (255, -1, -9999, 65535)]
        kept = [v for v in found if v not in unlabelled] or found
        if unlabelled:
            raster["nodata"] = unlabelled[0]
        known = _WORLDCOVER if len(kept) > 2 and set(kept) <= set(_WORLDCOVER) else None
        if min(kept) >= 0 and max(kept) < _MAX_LABELS and not known and max(kept) < 2 * len(kept) + 8:
            kept = list(range(max(kept) + 1))  # a class that the sample lacks may occur elsewhere
        fields = class_fields(dict.fromkeys(map(str, kept), 0), False, known)
        target.fields |= fields
        if unlabelled or nodata is not None:
            target.fields["classes"] = [*fields["classes"], "unlabelled"]  # type: ignore[misc]
            target.fields["ignored"] = ["unlabelled"]
            target.notes["ignored"] = Note("pixels without a label")
        said = "ESA WorldCover" if known else "write the names; other values are an error that names them"
        target.notes["classes"] = Note(said, True)

    def _vectors(self, draft: Draft, listing: Listing) -> None:
        paths = [p for p in listing.paths if p.lower().endswith(labels.VECTOR_SUFFIXES)]
        paths += [p for p in listing.paths if p.lower().endswith(".parquet") and self._is_geoparquet(p)]
        self._geoparquet = set(paths)
        if len(paths) > 20:
            self._remarks.append(f"Not used: {len(paths)} vector files (one per tile?), first {paths[0]}.")
            return
        for path in paths:
            vector = self._read(labels.read_vector, path)
            if isinstance(vector, str):
                self._messages.append(f"{path}: cannot be read ({vector}); left out")
            elif vector.is_area and draft.grid is not None and "area" not in draft.grid:
                area: dict[str, object] = {"file": path, **_layer_and_crs(draft, vector)}
                draft.grid["area"] = area
                assumed = "" if vector.crs else "; crs is that of the images, since the file declares none"
                draft.grid_notes["area"] = Note(
                    f"{vector.num_features} polygons; remove it to keep all tiles{assumed}", True
                )
            elif vector.label is None and _METADATA.search(Path(path).stem):
                self._remarks.append(f"Not used: {path}, as it has no attribute with classes.")
            elif not vector.is_polygons:
                self._remarks.append(
                    f"Not used: {path} has {vector.geometry} features; labels need polygons."
                )
            elif any(r.bounds is None for r in draft.rasters):
                self._remarks.append(f"Not used: {path}, since the images have no coordinates.")
            else:
                self._vector_target(draft, vector)

    def _vector_target(self, draft: Draft, vector: labels.Vector) -> None:
        column = vector.label
        stem = re.sub(r"[^A-Za-z0-9]+", "_", vector.layer or Path(vector.path).stem).strip("_").lower()
        name = unique_name(stem or "labels", [t.name for t in self._targets])
        where: dict[str, object] = {"files": vector.path, **_layer_and_crs(draft, vector)}
        fields: dict[str, object] = {
            "kind": "segmentation",
            "vector": where,
            "resolution_m": self._label_m(draft),
        }
        target = TargetDraft(name, fields, "")
        target.notes["resolution_m"] = Note("metres, a pixel of the label maps", True)
        if vector.crs is None:
            target.notes["vector"] = Note("crs is that of the images, since the file declares none", True)
        if column is None:
            classes = ["background", name]
            target.fields |= {"classes": classes, "outside": "background"}
            target.notes["classes"] = Note(
                "the polygons are one class; name an attribute under vector.column", True
            )
        else:
            where["column"] = column.name
            found = class_fields(column.values, column.is_text)
            listed = [*found["classes"], "unlabelled"]  # type: ignore[misc]
            target.fields |= {**found, "classes": listed, "ignored": ["unlabelled"]}
            others = [
                c.name
                for c in vector.columns
                if c.kind == "classes" and c is not column and len(c.values) > 1
            ]
            other = f"; other attributes: {', '.join(others[:5])}" if others else ""
            target.notes["classes"] = Note(f"the values of {column.name}{other}", True)
            target.notes["ignored"] = Note(
                "no label outside of the polygons; or a class of its own: outside: background", True
            )
        numbers = [c.name for c in vector.columns if c.kind == "number" and not c.is_integer]
        target.found = f"{_number(vector.num_features, 'polygon')} in {_crs_text(vector.crs)}" + (
            f"; {column.name}: {counts_text(column.values)}" if column else ""
        )
        target.found += f"; numbers for kind: regression: {', '.join(numbers[:5])}" if numbers else ""
        self._targets.append(target)

    def _tar_dates(self, rasters: Sequence[RasterDraft]) -> dict[str, TarTexts]:
        """What the text members of tars say, by the pattern of the tars. Gives rasters the dates that are there."""
        found: dict[str, TarTexts] = {}
        for raster in rasters:
            if raster.family is None or not raster.files.endswith(".tar"):
                continue
            if raster.files not in found:
                files = raster.family.files
                path = files[len(files) // 2].path
                try:
                    found[raster.files] = read_texts(self._src, path)
                except DatasetError as error:
                    self._messages.append(str(error).removeprefix(f"{self._src}/"))
                    continue
            if raster.dates is None and (dates := found[raster.files].dates) is not None:
                raster.dates = {"from": "coordinate", "coordinate": dates}
                raster.assume("dates", "text members of the tars that are dates")
        return found

    def _tar_targets(self, tars: Mapping[str, TarTexts]) -> None:
        for pattern, texts in tars.items():
            if texts.label is None:
                continue
            column = texts.label
            name = unique_name(re.split(r"[./]", column.name)[-1], [t.name for t in self._targets])
            values = dict(column.values)
            if (
                not column.is_text
                and min(map(int, values)) >= 0
                and max(map(int, values)) < 2 * len(values) + 8
            ):
                values = {str(i): values.get(str(i), 0) for i in range(max(map(int, values)) + 1)}
            target = TargetDraft(
                name,
                {
                    "kind": "classification",
                    "table": {"file": pattern, "column": column.name},
                    **class_fields(values, column.is_text),
                },
                f"{column.name} of {texts.num_tiles} tiles of a tar: {counts_text(column.values)}",
            )
            target.notes["classes"] = Note("those of one tar; write the names, and any others", True)
            self._targets.append(target)

    def _label_m(self, draft: Draft) -> float:
        """Pixel size of rasterised labels: that of the finest raster, or part of its patch if that is too fine."""
        finest = min(draft.sizes.rasters, key=lambda r: r.resolution_m)
        for factor in range(1, finest.patch + 1):
            if (
                finest.patch % factor == 0
                and draft.sizes.tile_m / (finest.resolution_m * factor) <= _LABEL_PIXELS
            ):
                return round(finest.resolution_m * factor, 6)
        return round(finest.resolution_m * finest.patch, 6)

    def _tables(self, draft: Draft, listing: Listing) -> None:
        paths = [
            p
            for p in listing.paths
            if p.lower().endswith(labels.TABLE_SUFFIXES) and p not in self._geoparquet | self._used
        ]
        keys = set().union(*(r.keys for r in draft.rasters))
        keys = self._with_prefix(draft, listing, paths[:20], keys)
        self._split_lists(draft, listing, keys)
        for path in paths[:20]:
            table = self._read(labels.read_table, path, keys)
            if isinstance(table, str):
                self._messages.append(f"{path}: cannot be read ({table}); left out")
                continue
            if table.key is None or table.num_matched * 2 < min(len(keys), table.num_rows):
                if Path(path).stem.lower() not in words.SPLITS:
                    self._remarks.append(f"Not used: {path}, none of its columns has the keys of tiles.")
                continue
            if (
                table.split is not None
                and draft.splits is None
                and not any("{split}" in r.files for r in draft.rasters)
            ):
                draft.splits = {"column": {"file": path, "key": table.key, "column": table.split.name}}
                draft.splits_note = f"found: {counts_text(table.split.values)}"
                draft.splits |= _split_names(table.split.values)
            self._table_dates(draft, table)
            if draft.grid is None:
                self._table_targets(table)

    def _with_prefix(self, draft: Draft, listing: Listing, paths: Sequence[str], keys: set[str]) -> set[str]:
        """The keys as tables call them: if these contain the constant text before ``{key}``, so do all keys."""
        match = re.search(r"([^/{}*]+)\{key\}", draft.rasters[0].files)
        if match is None or any(r.key for r in draft.rasters):
            return keys
        prefixed = {match[1] + key for key in keys}
        lists = [
            p for p in listing.paths if Path(p).stem.lower() in words.SPLITS and p.endswith((".txt", ".lst"))
        ]
        listed: set[str] = set().union(*(self._list_keys(p) for p in lists))
        tables = [self._read(labels.read_table, p, prefixed) for p in paths]
        matched = max((t.num_matched for t in tables if isinstance(t, labels.Table)), default=0)
        if not matched and not prefixed & {Path(k).stem for k in listed}:
            return keys
        for r in draft.rasters:
            r.key, r.keys = f"{match[1]}{{key}}", frozenset(match[1] + key for key in r.keys)
        for target in self._targets:
            raster = target.fields.get("raster")
            if isinstance(raster, dict):
                raster["key"] = f"{match[1]}{{key}}"
        return prefixed

    def _split_lists(self, draft: Draft, listing: Listing, keys: set[str]) -> None:
        """``train.txt``, ``val.csv`` and so on, with the keys of tiles."""
        groups: dict[tuple[str, str], list[str]] = {}
        for path in listing.paths:
            stem, suffix = Path(path).stem, Path(path).suffix
            if stem.lower() in words.SPLITS and suffix.lower() in (".txt", ".csv", ".lst"):
                groups.setdefault((str(Path(path).parent), suffix), []).append(path)
        for (folder, suffix), paths in sorted(groups.items()):
            lists = {Path(p).stem: self._list_keys(p) for p in paths}
            if any(set(found) & keys for found in lists.values()) and draft.splits is None:
                pattern = f"{{split}}{suffix}" if folder == "." else f"{folder}/{{split}}{suffix}"
                draft.splits = {"lists": {"file": pattern}, **_split_names(lists)}
                draft.splits_note = f"found: {', '.join(f'{len(v)} tiles of {n}' for n, v in lists.items())}"

    def _table_dates(self, draft: Draft, table: labels.Table) -> None:
        if table.date is None:
            return
        for r in draft.rasters:
            note = r.notes.get("dates")
            if (
                isinstance(r.dates, dict)
                and r.dates.get("from") == "constant"
                and note is not None
                and note.assumed
            ):
                r.dates = {
                    "from": "csv",
                    "file": table.path,
                    "key": str(table.key),
                    "column": table.date.name,
                }
                r.assume(
                    "dates", "a table that names dates; set format if they are not YYYYMMDD or YYYY-MM-DD"
                )

    def _table_targets(self, table: labels.Table) -> None:
        found = table.labels
        shares = [
            c
            for c in found
            if c.kind in ("number", "classes") and not c.is_text and c.low >= 0 and c.high <= 1
        ]
        taken = [t.name for t in self._targets]
        where: dict[str, object] = {"file": table.path, "key": table.key}
        if len(shares) >= 3:
            names = [c.name for c in shares]
            target = TargetDraft(
                unique_name("shares", taken),
                {
                    "kind": "multilabel",
                    "table": {**where, "columns": names},
                    "classes": names,
                    "threshold": 0.0,
                },
                f"{table.num_rows} rows",
            )
            target.notes["kind"] = Note(
                "numbers from 0 to 1 in several columns: shares of classes, or 0 and 1", True
            )
            self._targets.append(target)
            found = [c for c in found if c not in shares]
        for column in found[:10]:
            name = unique_name(column.name.lower(), [t.name for t in self._targets])
            here = {**where, "column": column.name}
            if column.kind == "classes":
                target = TargetDraft(
                    name, {"kind": "classification", "table": here}, f"{counts_text(column.values)}"
                )
                target.fields |= class_fields(column.values, column.is_text)
                target.notes["classes"] = Note("the values of the column", True)
            else:
                target = TargetDraft(
                    name,
                    {"kind": "regression", "table": here, "units": ""},
                    f"{table.num_rows} rows, {column.low:g} to {column.high:g}",
                )
                target.notes["kind"] = Note("a number a tile; write its units", True)
            self._targets.append(target)

    def _class_folders(self, draft: Draft) -> None:
        """Folders that name classes, if nothing else is a label."""
        for r in draft.rasters:
            family = r.family
            if family is None or "{class}" not in r.files:
                continue
            if self._targets or draft.grid is not None or r is not draft.rasters[0]:
                r.files = r.files.replace("{class}", "*")
                continue
            target = TargetDraft(
                "class",
                {"kind": "classification", "name": "class", "classes": list(family.folders)},
                f"folders: {counts_text(family.folders)} files",
            )
            target.notes["kind"] = Note("the folders are classes; remove it if they are not", True)
            self._targets.append(target)

    # Splits

    def _propose_splits(self, draft: Draft) -> None:
        names: set[str] = set()
        for r in draft.rasters:
            if "{split}" in r.files and r.family is not None:
                names |= {part for f in r.family.files for part in _split_texts(r.files, f.path)}
        if names and draft.splits is None:
            other = _split_names(names)
            draft.splits_note = f"found: the folders {', '.join(sorted(names))} are splits."
            if other:
                draft.splits = other
            return
        if draft.splits is not None:
            return
        if all(r.bounds is not None for r in draft.rasters):
            tiles = draft.num_tiles or max(len(r.keys) for r in draft.rasters)
            side = max(1, round(math.sqrt(tiles / _BLOCKS)))
            draft.blocks = {
                "size_m": side * draft.sizes.tile_m,
                "fractions": {"train": 0.7, "val": 0.15, "test": 0.15},
                # In small blocks nearly every train tile has a neighbour of another split.
                "distance_m": draft.sizes.tile_m if side >= 3 else 0,
            }
        if self._blocks:
            if draft.blocks is None:
                raise DatasetError(
                    f"{self._src}: the images have no coordinates, so no blocks of ground can be drawn; leave out "
                    "--blocks"
                )
            draft.splits, draft.blocks = {"blocks": draft.blocks}, None
            draft.splits_note = (
                "assumed: blocks drawn at random; tiles nearer than distance_m to another split are left out"
            )


def _split_names(found: Iterable[str]) -> dict[str, object]:
    """``names`` of a splits section, where splits are called otherwise than train, val and test."""
    names: dict[str, list[str]] = {}
    for text in sorted(found):
        names.setdefault(words.SPLITS[text.lower()], []).append(text)
    other = {split: texts for split, texts in names.items() if texts != [split]}
    return {"names": other} if other else {}


def _split_texts(pattern: str, path: str) -> list[str]:
    depth = pattern.split("/")
    return [part for wanted, part in zip(depth, path.split("/"), strict=False) if wanted == "{split}"]


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ending(path: str, own: Sequence[str]) -> str:
    """A pattern for a file and those like it: the part of its name that no own file has."""
    folder, _, name = path.rpartition("/")
    tokens = re.findall(r"[A-Za-z]+|[^A-Za-z]+", name)
    mine = {t for p in own for t in re.findall(r"[A-Za-z]+", p.rpartition("/")[2])}
    other = next((t for t in tokens if t.isalpha() and t not in mine), None)
    prefix = "**/" if folder else ""
    return f"{prefix}*{other}*" if other else path


def _values_text(values: Values) -> str:
    if values.distinct is not None and len(values.distinct) <= 12:
        return f"values {', '.join(map(str, values.distinct))}"
    return f"values {values.low:g} to {values.high:g}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _layer_and_crs(draft: Draft, vector: labels.Vector) -> dict[str, object]:
    """Keys of a vector file: the layer if it has several, and a coordinate system if it declares none."""
    found: dict[str, object] = {"layer": vector.layer} if vector.layer else {}
    if vector.crs is None:
        found["crs"] = Counter(c for r in draft.rasters for c in sorted(r.crs)).most_common(1)[0][0]
    return found


def _units(raster: RasterDraft) -> list[Unit]:
    """The units of the systems of a raster's files, where these lie."""
    assert raster.bounds is not None
    return [unit_of(crs, raster.bounds) for crs in sorted(raster.crs)]


def _crs_text(crs: str | None) -> str:
    return "an unknown CRS" if crs is None else crs if len(crs) < 40 else f"{crs[:40]}…"
