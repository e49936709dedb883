"""STAC: the items of an ItemCollection file, or of a static catalog, whose assets are raster files.

``variable`` names the asset; with ``{band}`` in it, or without it, each band has an asset of its own, called as the
band or declaring it (``eo:bands``, ``bands``). The key of an item is its id, or the property that ``keys`` names; its
date is ``datetime``, or the property that ``dates.coordinate`` names. The projection extension says where an asset lies
whose file does not.

Only ``child`` and ``item`` links and assets are followed. Those of a local catalog lead to files below SRC, or to
remote ones; those of a remote one to remote ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.georeference import Affine
from maestro_scale.datasets.sources.listing import list_files, some_names
from maestro_scale.datasets.sources.protocol import Date, ImageRef
from maestro_scale.datasets.sources.raster_images import JoinedImage, Opener, RasterParts
from maestro_scale.datasets.sources.times import NO_DATE, read_dates
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten

_SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_MAX_DOCUMENTS = 2_000_000
_CRS, _TRANSFORM = "proj:code=", "proj:transform="  # in parts of references, after the addresses


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`: an image per item. Reads the catalog.

    Items that have none of the assets, as those of other sensors, are left out.
    """
    for ref in list_files(section, src):
        undated: list[str] = []
        assets: set[str] = set()
        count = found = 0
        for item in items_of(ref.address, src):
            count += 1
            assets.update(item.assets)
            names = _asset_names(section, ref, item)
            if not any(names):
                continue
            found += 1
            try:
                date = ref.date or _date(section, item)
            except DatasetError as error:
                undated.append(str(error))
                continue
            hrefs = [item.assets[name] if name else "" for name in names]
            address = next(h for h in hrefs if h)
            part = tuple(hrefs[1:]) if hrefs[0] else ("", *hrefs[1:])
            place = item.places[next(n for n in names if n)]
            yield replace(ref, address=address, key=_key(section, item), date=date, part=(*part, *place))
        if undated:
            raise DatasetError(f"{undated[0]} ({len(undated)} of {count} items)", NO_DATE)
        if not found:
            known = f"assets are {some_names(sorted(assets))}" if assets else "there are none"
            raise DatasetError(
                f"{ref.address}: none of {count} items has the asset; set variable, or from of the bands ({known})",
                "a variable is missing",
            )


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[StacAssets]:
    """As :meth:`.protocol.Source.open_file`. ``address``: of the first asset of an image."""
    parts = RasterParts(section)
    try:
        yield StacAssets(address, section, parts)
    finally:
        parts.close()


class StacAssets:
    """The assets of an image (a :class:`.protocol.OpenFile`), opened as they are needed.

    ``part`` of a reference: addresses of the other assets, in the order of the bands ("" for one that is missing), and
    where the item says that they lie.
    """

    def __init__(self, address: str, section: ImageFiles, parts: RasterParts) -> None:
        self._address, self._section, self._parts = address, section, parts

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """``ref``: an image per item."""
        return [ref]

    def image(self, ref: ImageRef) -> JoinedImage:
        """The image; DatasetError if one of its assets is missing."""
        texts = [str(p) for p in ref.part]
        crs = next((t.removeprefix(_CRS) for t in texts if t.startswith(_CRS)), None)
        affine = next((t.removeprefix(_TRANSFORM) for t in texts if t.startswith(_TRANSFORM)), None)
        hrefs = [self._address, *(t for t in texts if not t.startswith((_CRS, _TRANSFORM)))]
        if "" in hrefs:
            lacking = [self._section.band_sources[i] for i in ref.bands]
            raise DatasetError(
                f"{self._address}: item {ref.key} lacks an asset of {', '.join(map(str, lacking))}; leave it out",
                "an asset is missing",
            )
        each = len(hrefs) > 1 or (
            len(ref.bands) == 1 and isinstance(self._section.band_sources[ref.bands[0]], str)
        )
        place: Affine | None = None
        if affine is not None:
            a, b, c, d, e, f = (float(v) for v in affine.split(","))
            place = (a, b, c, d, e, f)
        openers = [_opener(href) for href in hrefs]
        return self._parts.image(ref, openers, each, ref.date, crs, place)


@dataclass(frozen=True)
class Item:
    """What is needed of an item. ``assets``: name → address. ``bands``: name of a band → name of the only asset that
    has it, alone. ``places``: by asset, parts of references."""

    key: str
    where: str
    properties: Mapping[str, Any]
    assets: Mapping[str, str]
    bands: Mapping[str, str]
    places: Mapping[str, tuple[str, ...]]


def items_of(address: str, src: str) -> Iterator[Item]:
    """The items of a catalog or an ItemCollection, in its order. DatasetError for a document that cannot be read, and
    for links that lead out of ``src``."""
    waiting, seen = [address], {address}
    while waiting:
        where = waiting.pop()
        document = _read(where)
        kind = document.get("type")
        if kind == "FeatureCollection":
            features = document.get("features")
            for number, feature in enumerate(features if isinstance(features, list) else []):
                yield _item(feature, where, f"{where}: features[{number}]", src)
        elif kind == "Feature":
            yield _item(document, where, where, src)
        elif kind in ("Catalog", "Collection") or "links" in document:
            links = [_resolved(link.get("href"), where, src) for link in _links(document)]
            fresh = [link for link in dict.fromkeys(links) if link not in seen]
            seen.update(fresh)
            if len(seen) > _MAX_DOCUMENTS:
                raise DatasetError(f"{address}: leads to more than {_MAX_DOCUMENTS} documents")
            waiting += reversed(fresh)
        else:
            raise DatasetError(f"{where}: is no STAC document (type {shorten(kind)}); check the path")


def _read(where: str) -> dict[str, Any]:
    try:
        content = remote.read_document(where, untrusted.MANIFEST)
        return untrusted.field_of(untrusted.load_json(content, where, untrusted.MANIFEST), dict, where=where)
    except untrusted.InputError as error:
        raise DatasetError(str(error)) from error


def _links(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    links = document.get("links")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("rel") in ("child", "item"):
            yield link


def _resolved(href: Any, base: str, src: str) -> str:
    """The address that a document at ``base`` names."""
    if not isinstance(href, str) or not href:
        raise DatasetError(f"{base}: has a link without an address; write it again")
    if href.startswith("file://"):
        href = href.removeprefix("file://")
    scheme = urlsplit(href).scheme if "://" in href else ""
    if scheme:
        if scheme not in _SCHEMES:
            raise DatasetError(f"{base}: names {shorten(href)}; addresses are {', '.join(_SCHEMES)}")
        return href
    if remote.is_remote(base):
        if base.startswith(("http://", "https://")):
            return urljoin(base, href)
        if href.startswith("/"):
            raise DatasetError(f"{base}: names the local path {shorten(href)}, which is not followed")
        bucket, _, folder = base.split("://", 1)[1].partition("/")
        path = os.path.normpath(os.path.join(os.path.dirname(folder), href))
        if path.startswith(".."):
            raise DatasetError(f"{base}: names {shorten(href)}, which is outside of {bucket}")
        return f"{base.split('://', 1)[0]}://{bucket}/{path}"
    path = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(remote.local_path(base))), href))
    if not remote.is_remote(src):
        root = os.path.abspath(remote.local_path(src))
        if os.path.commonpath([root, path]) != root:
            raise DatasetError(
                f"{base}: names {shorten(path)}, which is not below {root}; give a folder above both as SRC"
            )
    return path


def _item(feature: Any, base: str, where: str, src: str) -> Item:
    import pystac

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated extensions
            item = pystac.Item.from_dict(untrusted.field_of(feature, dict, where=where), preserve_dict=False)
        assets = {name: _resolved(asset.href, base, src) for name, asset in item.assets.items()}
        places = {name: _place({**item.properties, **a.extra_fields}) for name, a in item.assets.items()}
    except (pystac.STACError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DatasetError):
            raise
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{where}: is no STAC item ({shorten(cause, 200)}); write it again") from error
    properties = dict(item.properties)
    if properties.get("datetime") is None and item.datetime is not None:
        properties["datetime"] = item.datetime.isoformat()
    return Item(str(item.id), where, properties, assets, _bands(item), places)


def _bands(item: Any) -> dict[str, str]:
    """Name, or common name, of a band → the asset with this band alone."""
    found: dict[str, list[str]] = {}
    for name, asset in item.assets.items():
        bands = asset.extra_fields.get("bands") or asset.extra_fields.get("eo:bands")
        if not isinstance(bands, list) or len(bands) != 1 or not isinstance(bands[0], dict):
            continue
        called = {bands[0].get(n) for n in ("name", "common_name", "eo:common_name")}
        for text in called:
            if isinstance(text, str):
                found.setdefault(text, []).append(name)
    return {text: names[0] for text, names in found.items() if len(names) == 1}


def _place(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """What the projection extension says, as parts of references. ``fields``: of an asset, and of its item."""
    code = fields.get("proj:code")
    if code is None and isinstance(fields.get("proj:epsg"), int):
        code = f"EPSG:{fields['proj:epsg']}"
    parts = [f"{_CRS}{code}"] if isinstance(code, str) else []
    transform = fields.get("proj:transform")
    if isinstance(transform, list) and len(transform) >= 6:
        numbers = np.asarray(transform[:6], dtype=np.float64)
        parts.append(_TRANSFORM + ",".join(map(repr, numbers.tolist())))
    return tuple(parts)


def _asset_names(section: ImageFiles, ref: ImageRef, item: Item) -> list[str | None]:
    """Names of the assets of an image, in the order of the bands, or of the one with all; None where one is missing."""
    wanted = [str(section.band_sources[i]) for i in ref.bands]
    variable = section.variable
    if variable is not None and "{band}" not in variable:
        return [variable if variable in item.assets else None]
    names = [w if variable is None else variable.replace("{band}", w) for w in wanted]
    return [n if n in item.assets else item.bands.get(w) for n, w in zip(names, wanted, strict=True)]


def _key(section: ImageFiles, item: Item) -> str:
    if section.keys is None:
        return item.key
    value = item.properties.get(section.keys)
    if not isinstance(value, (str, int)) or value == "":
        known = some_names(sorted(item.properties))
        raise DatasetError(f"{item.where}: has no property {section.keys}; it has {known}", "wrong keys")
    return str(value)


def _date(section: ImageFiles, item: Item) -> Date | None:
    dates = section.dates
    if dates is not None and dates.from_ != "coordinate":
        return None
    names = [dates.coordinate] if dates and dates.coordinate else ["datetime", "start_datetime"]
    value = next((item.properties[n] for n in names if item.properties.get(n) is not None), None)
    if not isinstance(value, str):
        raise DatasetError(f"{item.where}: has no property {' or '.join(map(str, names))}", "no date")
    format, part = (dates.format, dates.part) if dates else (None, None)
    return read_dates(np.array([value], object), lambda _: None, format, part, item.where)[0]


def _opener(address: str) -> Opener:
    if not remote.is_remote(address):
        return address, lambda: raw.open_raster(Path(remote.local_path(address)))

    @contextmanager
    def opened() -> Iterator[Any]:
        with remote.open_binary(address) as file, raw.open_raster_file(file, address) as raster:
            yield raster

    return address, opened
