"""Tars in the layout of WebDataset: the members of a tile have one name, up to its first dot, and different suffixes.

``files`` may have braces (``{000..099}``, ``{a,b}``), which the webdataset library expands. ``variable`` is the suffix
of the member with the image: ``tif``, ``s2.npy``, ``{band}.tif`` for a member per band, or ``zarr.zip/bands`` and
``npz/s2`` for an array in a member. ``dates.coordinate`` may be a member, too: ``json/properties/date``, ``date.txt``.
The library reads tars from begin to end. Here tiles are read in any order, so the headers of each tar are read once,
and every reference says where its members are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import hdf5, numpy_files, remote, zarr
from maestro_scale.datasets.sources.array_image import ArrayStore, StoredArray
from maestro_scale.datasets.sources.arrays import ArrayFile
from maestro_scale.datasets.sources.files import RasterFile
from maestro_scale.datasets.sources.listing import list_files, some_names
from maestro_scale.datasets.sources.protocol import Date, Image, ImageRef
from maestro_scale.datasets.sources.raster_images import RasterParts
from maestro_scale.datasets.sources.times import read_dates
from maestro_scale.datasets.spec import DatasetError

Sample = Mapping[str, tuple[int, int]]
"""Suffix → offset and size of a member."""

_RASTERS = ("tif", "tiff", "png", "jp2")
_ARRAYS = ("npy", "npz", "zarr.zip", "nc", "nc4", "h5", "hdf5")
_TEXTS = ("json", "txt", "text", "cls")
KEY = "__key__"
"""What the library calls the name of a sample, and the first column of tars as a table."""
_MAX_TEXT = untrusted.HEADER
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAX_SHARDS = 1_000_000
_PREFETCHED_BYTES = 16 * 1024 * 1024


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`: an image per tile. Reads the headers of the tars."""
    for ref in _shards(section, src):
        samples = index(ref.address)
        suffixes = _suffixes(section, ref, samples)
        extra = _date_member(section)
        # A tile may lack a sensor, or have it in another tar.
        found = {key: s for key, s in samples.items() if all(suffix in s for suffix in suffixes)}
        if not found:
            there = some_names(sorted({suffix for s in samples.values() for suffix in s}))
            raise DatasetError(
                f"{ref.address}: no tile has {' and '.join(suffixes)}; set variable to one of the suffixes: {there}",
                "a variable is missing",
            )
        for key, sample in found.items():
            names = [*suffixes, *(n for n in sample if n == extra and n not in suffixes)]
            part = tuple(x for name in names for x in (name, *sample[name]))
            yield replace(ref, key=key, part=part)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[TarFile]:
    """As :meth:`.protocol.Source.open_file`."""
    parts = RasterParts(section)
    with remote.open_binary(address) as file:
        try:
            yield TarFile(file, address, section, parts)
        finally:
            parts.close()


def read_table(files: str, src: str, columns: Sequence[str]) -> dict[str, list[str]]:
    """The texts of the samples in tars: their keys, and for each of ``columns`` (``cls``, ``json/label``) a text.

    A list is written with commas; a sample without such a member, or without a value there, has an empty text.
    DatasetError if no sample has one, or a tar or member cannot be read.
    """
    table: dict[str, list[str]] = {KEY: [], **{name: [] for name in columns}}
    for ref in _shards(ImageFiles(files=files), src):
        with remote.open_binary(ref.address) as file:
            for key, members in index(ref.address).items():
                store = SampleStore(file, members, f"{ref.address}: {key}")
                table[KEY].append(key)
                for name in columns:
                    array = store.find(name)
                    items = [] if array is None else np.asarray(array.read((slice(None),))).tolist()
                    table[name].append(",".join("" if item == "None" else str(item) for item in items))
    if not table[KEY]:
        raise DatasetError(
            f"{remote.join(src, files)}: matches no tar with samples; fix the pattern", remote.MISSING
        )
    for name in columns:
        if not any(table[name]):
            raise DatasetError(
                f"{remote.join(src, files)}: no sample has {name}; name another member", "no label"
            )
    return table


def index(address: str) -> dict[str, Sample]:
    """The members of a tar by tile key, in stored order; DatasetError if it is damaged, compressed, or has a member
    twice."""
    from webdataset.tariterators import base_plus_ext

    try:
        # Not buffered: the payloads between the headers are not wanted.
        with remote.open_unbuffered(address) as file:
            members = untrusted.list_tar_file(file)
    except (untrusted.InputError, OSError) as error:
        raise DatasetError(
            f"{address}: is not a complete tar ({error}); fetch it again, or unpack it if it is compressed"
        ) from error
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members:
        key, suffix = base_plus_ext(member.name.removeprefix("./"))
        if key is None or key.rsplit("/", 1)[-1].startswith("__"):  # as the library: metadata
            continue
        sample = samples.setdefault(key, {})
        if suffix.lower() in sample:
            raise DatasetError(f"{address}: has the member {member.name} twice; write it again")
        sample[suffix.lower()] = (member.offset, member.size)
    return samples  # type: ignore[return-value]


def _shards(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """The tars; DatasetError if shards that are named by braces are missing."""
    assert section.files is not None
    missing = []
    names = _expanded(section.files)
    for name in names:
        refs = list(list_files(section.model_copy(update={"files": name}), src))
        if not refs and len(names) > 1:
            missing.append(name)
        yield from refs
    if missing and len(missing) < len(names):
        raise DatasetError(
            f"{remote.join(src, missing[0])}: is missing ({len(missing)} of {len(names)} shards of {section.files}); "
            "fetch them, or correct the braces",
            remote.MISSING,
        )


def _expanded(files: str) -> list[str]:
    """The names that braces stand for, as the library expands them; DatasetError if these are wrong, or too many."""
    from webdataset.shardlists import expand_urls

    num = 1
    for low, high in _RANGE.findall(files):
        num *= abs(int(high) - int(low)) + 1
    for names in _LIST.findall(files):
        num *= names.count(",") + 1
    if num > _MAX_SHARDS:
        raise DatasetError(f"{files}: stands for more than {_MAX_SHARDS} tars; correct the braces")
    try:
        return list(expand_urls(files))
    except ValueError as error:
        raise DatasetError(f"{files}: has braces that do not match ({error}); correct them") from error


def _suffixes(section: ImageFiles, ref: ImageRef, samples: Mapping[str, Sample]) -> list[str]:
    """Suffixes of the members of an image: one, or one per band."""
    variable = section.variable
    if variable is not None:
        wanted = [section.band_sources[i] for i in ref.bands] if "{band}" in variable else [""]
        names = [variable.replace("{band}", str(w)).lower().split("/", 1)[0] for w in wanted]
        return list(dict.fromkeys(names))
    known = {suffix for s in samples.values() for suffix in s if _kind(suffix) in _RASTERS + _ARRAYS}
    if len(known) != 1:
        there = f"there are {some_names(sorted(known))}" if known else "none is an image"
        raise DatasetError(
            f"{ref.address}: which member has the image is not said: set variable to a suffix ({there})",
            "variable",
        )
    return list(known)


def _kind(suffix: str) -> str | None:
    """The format that a suffix says: ``npy`` of ``s2.npy``."""
    known = [k for k in (*_RASTERS, *_ARRAYS, *_TEXTS) if suffix == k or suffix.endswith(f".{k}")]
    return max(known, key=len) if known else None


def _date_member(section: ImageFiles) -> str | None:
    """The suffix in ``dates.coordinate``: ``json`` of ``json/properties/date``."""
    dates = section.dates
    if dates is None or dates.from_ != "coordinate" or not dates.coordinate:
        return None
    return dates.coordinate.lower().split("/", 1)[0]


class TarFile:
    """An open tar (a :class:`.protocol.OpenFile`).

    ``part`` of a reference: suffix, offset and size of each member, then what the format of the member adds.
    """

    def __init__(self, file: BinaryIO, address: str, section: ImageFiles, parts: RasterParts) -> None:
        self._file, self._address, self._section, self._parts = file, address, section, parts
        self._last: tuple[tuple[int | str, ...], SampleStore] | None = None

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """The images of a tile."""
        own, rest = _split(ref.part)
        inner = replace(ref, part=rest)
        store = self._store(own, ref)
        if not store.is_raster:
            found = ArrayFile(store, self._section).images(inner)
        elif "date" in (self._section.axes or ()):
            with store.open_raster() as raster:
                found = RasterFile(raster, store.where, self._section).images(inner)
            dates = self._raster_dates(store)
            if dates is not None and len(dates) == len(found):
                found = [replace(r, date=d) for r, d in zip(found, dates, strict=True)]
        else:
            found = [inner]
        return [replace(r, part=(*own, *r.part)) for r in found]

    def image(self, ref: ImageRef) -> Image:
        """One image of a tile."""
        own, rest = _split(ref.part)
        inner = replace(ref, part=rest)
        store = self._store(own, ref)
        if not store.is_raster:
            return ArrayFile(store, self._section).image(inner)
        dates = self._raster_dates(store)
        date = None if not dates else dates[int(rest[0]) if rest and len(dates) > 1 else 0]
        names = [n for n in store.members if _kind(n) in _RASTERS]
        each = "{band}" in (self._section.variable or "")
        openers = [(f"{store.where}.{name}", lambda name=name: store.open_raster(name)) for name in names]
        return self._parts.image(inner, openers, each, date)

    def _raster_dates(self, store: SampleStore) -> list[Date] | None:
        name, dates = _date_member(self._section), self._section.dates
        if name is None or dates is None or dates.coordinate is None:
            return None
        array = store.find(dates.coordinate)
        if array is None:
            raise DatasetError(f"{store.where}: has no {dates.coordinate}; set dates.coordinate", "no date")
        values = np.asarray(array.read(tuple(slice(0, n) for n in array.shape))).reshape(-1)
        where = f"{store.where}: {dates.coordinate}"
        return read_dates(values, array.attribute, dates.format, dates.part, where)

    def _store(self, own: tuple[int | str, ...], ref: ImageRef) -> SampleStore:
        if self._last is None or self._last[0] != own:
            members = {str(own[i]).lower(): (int(own[i + 1]), int(own[i + 2])) for i in range(0, len(own), 3)}
            most = _PREFETCHED_BYTES if remote.is_remote(self._address) else 0
            self._last = (own, SampleStore(self._file, members, f"{self._address}: {ref.key}", most))
        return self._last[1]


def _split(part: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
    """The members that a part begins with, and the rest."""
    end = 0
    while end < len(part) and isinstance(part[end], str):
        end += 3
    return part[:end], part[end:]


class SampleStore:
    """The members of a tile in an open tar (an :class:`.array_image.ArrayStore`): ``suffix`` or ``suffix/array``.

    Members with text are arrays of texts: ``txt``, and ``json/properties/date`` of what is at that path.
    """

    errors = (*zarr.ZarrStore.errors, *hdf5.ERRORS)

    def __init__(self, file: BinaryIO, members: Sample, where: str, prefetched: int = 0) -> None:
        """``prefetched``: largest size of a member that is read as a whole, by one request instead of several."""
        self._file, self.members, self.where, self._prefetched = file, members, where, prefetched
        self._stores: dict[str, ArrayStore] = {}

    @property
    def is_raster(self) -> bool:
        """Whether the image is in raster files, such as GeoTIFFs."""
        return any(_kind(suffix) in _RASTERS for suffix in self.members)

    def open_raster(self, suffix: str | None = None) -> Any:
        """The raster in a member (default: the first), to be opened by ``with``."""
        name = suffix or next(n for n in self.members if _kind(n) in _RASTERS)
        return raw.open_raster_file(self._member(name), f"{self.where}.{name}")

    def names(self) -> Sequence[str]:
        names = []
        for suffix in self.members:
            if _kind(suffix) == "npy":
                names.append(suffix)
            elif _kind(suffix) in _ARRAYS:
                names += [f"{suffix}/{name}" for name in self._store_of(suffix).names()]
        return names

    def find(self, name: str) -> StoredArray | None:
        suffix, inner = self._split(name)
        if suffix not in self.members:
            return None
        kind = _kind(suffix)
        if kind in _TEXTS:
            return self._text(suffix, inner)
        if kind not in _ARRAYS:
            raise DatasetError(
                f"{self.where}: {suffix} is no image; images are {', '.join(_RASTERS + _ARRAYS)}", "variable"
            )
        return self._store_of(suffix).find(inner or numpy_files.ARRAY)

    def beside(self, name: str, other: str) -> str:
        if self._split(other)[0] in self.members:
            return other
        suffix, inner = self._split(name)
        return f"{suffix}/{self._store_of(suffix).beside(inner, other)}"

    def _split(self, name: str) -> tuple[str, str]:
        suffix, _, inner = name.partition("/")
        return suffix.lower(), inner

    def _store_of(self, suffix: str) -> ArrayStore:
        if suffix not in self._stores:
            where, file = f"{self.where}.{suffix}", self._member(suffix)
            if _kind(suffix) in ("npy", "npz"):
                self._stores[suffix] = numpy_files.open_store(file, where)
            elif _kind(suffix) == "zarr.zip":
                self._stores[suffix] = zarr.open_zip(file, where)
            else:
                self._stores[suffix] = hdf5.new_store(file, where)
        return self._stores[suffix]

    def _member(self, suffix: str) -> BinaryIO:
        if suffix not in self.members:
            raise DatasetError(f"{self.where}: has no member {suffix}; set variable", "a variable is missing")
        start, size = self.members[suffix]
        if size > self._prefetched:
            return io.BufferedReader(remote.Part(self._file, start, size))
        try:
            self._file.seek(start)
            return io.BytesIO(self._file.read(size))
        except OSError as error:
            raise DatasetError(f"{self.where}.{suffix}: cannot be read ({error})") from error

    def text_of(self, suffix: str) -> Any:
        """The document in a JSON member, or the words of another text; DatasetError if it is none of them."""
        where = f"{self.where}.{suffix}"
        kind = _kind(suffix)
        if kind not in _TEXTS:
            raise DatasetError(f"{where}: is no text; texts are {', '.join(_TEXTS)}", "variable")
        try:
            untrusted.check_size(self.members[suffix][1], where, _MAX_TEXT)
            content = self._member(suffix).read()
            if kind == "json":
                return untrusted.load_json(content, where, _MAX_TEXT)
            return content.decode("utf-8-sig").split()
        except (untrusted.InputError, ValueError, OSError) as error:
            raise DatasetError(f"{where}: cannot be read ({error})") from error

    def _text(self, suffix: str, path: str) -> StoredArray | None:
        value = self.text_of(suffix)
        for step in path.split("/") if path else ():
            if not isinstance(value, dict) or step not in value:
                return None
            value = value[step]
        items = value if isinstance(value, list) else [value]
        return numpy_files.MemoryArray(np.array([str(v) for v in items], object))
