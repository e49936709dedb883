"""What the text members of WebDataset tars say of their tiles: labels, and the dates of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from maestro_scale.datasets.describe import labels
from maestro_scale.datasets.describe.labels import Column
from maestro_scale.datasets.description.patterns import parse_date
from maestro_scale.datasets.sources import remote, webdataset_tars
from maestro_scale.datasets.spec import DatasetError

_MAX_SAMPLES = 1000  # of a tar
_MAX_DEPTH = 4  # of a JSON member
_LABEL = "cls"  # the suffix of class indices in WebDataset


@dataclass(frozen=True)
class TarTexts:
    """``label``: column of the tar as a table (``cls``, ``json/label``) with the classes of tiles. ``dates``: member,
    and path in it, with the dates of a tile's images, as ``dates.coordinate`` of a description."""

    num_tiles: int
    label: Column | None
    dates: str | None


def read_texts(src: str, path: str) -> TarTexts:
    """Of the first tiles of a tar below ``src``; DatasetError (one line) if it cannot be read."""
    address = remote.join(src, path)
    rows: list[dict[str, Any]] = []
    with remote.open_binary(address) as file:
        for key, members in islice(webdataset_tars.index(address).items(), _MAX_SAMPLES):
            rows.append(dict(_values(webdataset_tars.SampleStore(file, members, f"{address}: {key}"))))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [labels.column_of(n, [row[n] for row in rows if row.get(n) is not None]) for n in names]
    found = next((c for c in columns if c.name == _LABEL and c.kind == "classes"), None)
    scalars = [c for c in columns if not any(isinstance(row.get(c.name), list) for row in rows)]
    label = found or labels.best_label([c for c in scalars if labels.is_called_a_label(c)])
    dates = [n for n in names if rows and all(_is_date(row.get(n)) for row in rows)]
    return TarTexts(len(rows), label, min(dates, key=_likely_date) if dates else None)


def _values(store: webdataset_tars.SampleStore) -> Iterator[tuple[str, Any]]:
    for suffix in store.members:
        try:
            value = store.text_of(suffix)
        except DatasetError:  # damaged, or no text
            continue
        yield from _flat(suffix, value, _MAX_DEPTH)


def _flat(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The values of a JSON document by their paths."""
    if isinstance(value, Mapping):
        if depth:
            for step, inner in value.items():
                yield from _flat(f"{name}/{step}", inner, depth - 1)
    elif isinstance(value, list):
        yield name, value if len(value) != 1 else value[0]
    else:
        yield name, value


def _is_date(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    try:
        years = [parse_date(str(item), None)[0] for item in items]
    except ValueError:
        return False
    return bool(years) and all(1970 <= year <= 2100 for year in years)


def _likely_date(name: str) -> tuple[bool, int]:
    """Of several dates the one that is called so: a product also has those of its processing."""
    last = name.rpartition("/")[2].lower()
    called = last in ("date", "dates", "datetime", "time", "timestamp") or "acqui" in last or "sens" in last
    return not called, name.count("/")
