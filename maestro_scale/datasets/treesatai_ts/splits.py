"""Splits of TreeSatAI-TS: CSV files (the MAESTRO release), or .lst files with a JSON file of labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.spec import DatasetError

GENERA = (
    "Betula",
    "Cleared",
    "Quercus",
    "Larix",
    "Fraxinus",
    "Alnus",
    "Pseudotsuga",
    "Prunus",
    "Fagus",
    "Acer",
    "Abies",
    "Pinus",
    "Tilia",
    "Picea",
    "Populus",
)
LABELS_JSON = "labels/TreeSatBA_v9_60m_multi_labels.json"
_YEAR = re.compile(r"_((?:19|20)\d\d)\.h5$")


@dataclass(frozen=True)
class Entry:
    """One tile as the split lists it. ``aerial_date``: YYYYMMDD, or None if the release does not give it."""

    aerial_name: str
    sen_name: str
    aerial_date: str | None
    shares: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def year(self) -> str | None:
        """The year in the h5 name, if there is one."""
        found = _YEAR.search(self.sen_name)
        return found.group(1) if found else None


class SentinelNames:
    """Finds the h5 file of a tile: its name contains a year that the .lst files lack and releases disagree on."""

    def __init__(self, files: frozenset[str]) -> None:
        self.files = files
        self._by_tile: dict[str, list[str]] = {}
        for name in sorted(files):
            if name.endswith(".h5"):
                self._by_tile.setdefault(_YEAR.sub(".h5", name)[:-3], []).append(name)

    def find(self, aerial_name: str, listed: str | None) -> tuple[str, tuple[str, ...]]:
        """(file name, what was assumed); the listed or expected name, which is then missing, if no file fits."""
        if listed in self.files:
            return listed, ()
        tile = Path(aerial_name).stem
        fitting = self._by_tile.get(tile, [])
        if listed is not None and _YEAR.search(listed):
            # A file of another year is another series: only a name without year may replace the listed one.
            fitting = [name for name in fitting if not _YEAR.search(name)]
        if not fitting:
            return listed or f"{tile}_YEAR.h5", ()
        notes = ["several h5 files fit the tile: the latest year is taken"] if len(fitting) > 1 else []
        if listed is not None:
            notes.append("the h5 name in the split and the one on disk differ in the year: taken as the same")
        elif not _YEAR.search(fitting[-1]):
            notes.append("the h5 name has no year: the file called like the aerial image is taken")
        return fitting[-1], tuple(notes)


def from_csv(path: Path, sentinel: SentinelNames) -> list[Entry]:
    """The tiles of ``{split}.csv``; DatasetError if a column is missing or a share is not a number in 0–1."""
    columns, rows = raw.read_csv(path)
    missing = [c for c in ("aerial_name", *GENERA) if c not in columns]
    if missing:
        raise DatasetError(
            f"{path}: has no column {missing[0]!r} ({len(missing)} missing); fetch the file again"
        )
    picked = [columns[g] for g in GENERA]
    name_at, sen_at, date_at = columns["aerial_name"], columns.get("sen_name"), columns.get("aerial_date")
    entries = []
    for i, row in enumerate(rows):
        sen_name, notes = sentinel.find(row[name_at], row[sen_at] if sen_at is not None else None)
        try:
            shares = tuple(float(row[c]) for c in picked)
        except ValueError as error:
            raise DatasetError(f"{path}: row {i + 2} has a share that is not a number ({error})") from error
        _check_shares(shares, f"{path}: row {i + 2}")
        date = row[date_at].strip() if date_at is not None else None
        entries.append(Entry(row[name_at], sen_name, date or None, shares, notes))
    return entries


def from_lst(src: Path, path: Path, sentinel: SentinelNames) -> list[Entry]:
    """The tiles of ``{split}_filenames.lst``; DatasetError if the JSON in ``src`` does not label them all."""
    try:
        names = untrusted.read_bytes(path).decode().split()
        labels = untrusted.read_record(src / LABELS_JSON)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: it or its labels cannot be read ({error}); fetch both again") from error
    unlabelled = [n for n in names if n not in labels]
    if unlabelled:
        lacking = f"lacks {len(unlabelled)} tiles of {path.name}, first {unlabelled[0]}"
        raise DatasetError(f"{src / LABELS_JSON}: {lacking}; fetch both files again")
    entries = []
    for name in names:
        sen_name, notes = sentinel.find(name, None)
        listed = _listed_labels(labels[name], f"{src / LABELS_JSON}: {name}")
        unknown = [genus for genus, _ in listed if genus not in GENERA]
        if unknown:
            raise DatasetError(
                f"{src / LABELS_JSON}: {name} has unknown genus {unknown[0]!r}; known: {', '.join(GENERA)}"
            )
        given = dict(listed)
        shares = tuple(given.get(genus, 0.0) for genus in GENERA)
        _check_shares(shares, f"{src / LABELS_JSON}: {name}")
        entries.append(Entry(name, sen_name, None, shares, notes))
    return entries


def _listed_labels(value: object, where: str) -> list[tuple[str, float]]:
    """``[["Fagus", 0.75], …]``; DatasetError for anything else."""
    pairs = value if isinstance(value, list) else [None]
    found = []
    for pair in pairs:
        match pair:
            case [str(genus), int() | float() as share] if not isinstance(share, bool):
                found.append((genus, float(share)))
            case _:
                raise DatasetError(f"{where} has no list of [genus, share] pairs; fetch the file again")
    return found


def _check_shares(shares: Sequence[float], where: str) -> None:
    # Shares are rounded in the files, so that a sum of 1 may be stored as slightly more.
    if not all(0.0 <= s <= 1.001 for s in shares):
        raise DatasetError(f"{where} has a share outside 0–1; fix the file")
