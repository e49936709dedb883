"""Targets of a tile: from label images, tables, names in paths, or the shares of another target."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maestro_scale.datasets.description.assemble import Place, Stack, read_stack
from maestro_scale.datasets.description.index import SectionImages
from maestro_scale.datasets.description.sections.fields import is_integer
from maestro_scale.datasets.description.sections.targets import TableTarget
from maestro_scale.datasets.description.sections.targets import Target as TargetKeys
from maestro_scale.datasets.description.tables import KeyedRows, Table
from maestro_scale.datasets.spec import MISSING_CLASS, DatasetError, DatasetSpec, Target
from maestro_scale.errors import did_you_mean, shorten

_OUTSIDE = "a label outside the list"
_NO_LABEL = "pixels without a label"
_MISSING = ("", "nan", "none", "null", "na")


@dataclass(frozen=True)
class Labels:
    """How labels in the source become classes. ``classes``: label as text → index of the class, None for no label."""

    target: Target
    classes: Mapping[str, int | None]
    of_numbers: Mapping[int, int | None]

    @classmethod
    def of(cls, target: Target, keys: TargetKeys) -> Labels:
        """The mapping that the keys of a target stand for: by ``values``, else by index, and by the name of a class."""
        classes = keys.labels
        numbers = {int(label): i for label, i in classes.items() if is_integer(label)}
        return cls(target, classes, numbers)

    def class_of(self, text: str, where: str) -> int:
        """The index of a label in a table or a path, MISSING_CLASS for none; DatasetError if it is unknown."""
        if text.lower() in _MISSING and text not in self.classes:
            return MISSING_CLASS
        if text not in self.classes:
            raise DatasetError(
                f"{where}: {self.target.name} is {shorten(text)}{did_you_mean(text, self.classes)}; add it to values "
                "or classes",
                _OUTSIDE,
            )
        found = self.classes[text]
        return MISSING_CLASS if found is None else found

    def map_of(
        self, values: np.ndarray, invalid: np.ndarray | None, where: str, notes: list[str]
    ) -> np.ndarray:
        """(H, W) uint8 indices of an image of labels (H, W); ``invalid``: pixels that the file or section leave out.

        Pixels without a label get the first ignored class. DatasetError if there is none, or for an unknown label.
        """
        labels, inverse = np.unique(values, return_inverse=True)
        where_label = inverse.reshape(values.shape)  # numpy 2.0 gives it flat
        known = np.array([label in self.of_numbers for label in labels.tolist()], bool)
        found = [self.of_numbers.get(label) for label in labels.tolist()]
        unknown = np.array([index is None for index in found], bool)[where_label]
        outside = ~known[where_label]
        if invalid is not None:
            unknown |= invalid
            outside &= ~invalid
        if outside.any():
            raise DatasetError(
                f"{where}: holds {values[outside][0].item():g}, which {self.target.name} has no class for (known: "
                f"{_known(self.of_numbers)}); add it to values, or as nodata",
                _OUTSIDE,
            )
        indices = np.array([0 if index is None else index for index in found], np.uint8)[where_label]
        if unknown.any():
            if not self.target.ignored:
                raise DatasetError(
                    f"{where}: {int(unknown.sum())} pixels have no label, and {self.target.name} has no ignored class "
                    "for them; add one to classes and ignored, or leave the tile out",
                    _NO_LABEL,
                )
            notes.append(f"{self.target.name} has pixels without a label: stored as ignored")
            indices[unknown] = self.target.ignored[0]
        return indices


@dataclass(frozen=True)
class TargetReader:
    """Reads the targets of a tile. ``images`` of targets with label images, ``rows`` of those in tables, by name."""

    spec: DatasetSpec
    keys: Mapping[str, TargetKeys]
    images: Mapping[str, SectionImages] = field(default_factory=dict)
    tables: Mapping[str, TableLabels] = field(default_factory=dict)
    vectors: Mapping[str, Callable[[str, Place | None, list[str]], np.ndarray]] = field(default_factory=dict)

    def read(
        self, key: str, names: Mapping[str, str], place: Place | None, notes: list[str]
    ) -> tuple[dict[str, np.ndarray], list[tuple[str, Place]]]:
        """The targets of a tile as :class:`~maestro_scale.datasets.spec.Target` says, and where label images lie.

        ``names``: of the patterns of its rasters; ``place``: where it lies. DatasetError names file and cause.
        """
        found: dict[str, np.ndarray] = {}
        places: list[tuple[str, Place]] = []
        for target in self.spec.targets:
            keys = self.keys[target.name]
            if target.name in self.images:
                stack = self._stack(target, key)
                found[target.name] = label_image(target, keys, stack, notes)
                if stack.place is not None:
                    places.append((target.name, stack.place))
            elif target.name in self.tables:
                found[target.name] = self.tables[target.name].read(key)
            elif target.name in self.vectors:
                found[target.name] = self.vectors[target.name](key, place, notes)
            elif keys.name is not None:
                if keys.name not in names:
                    raise DatasetError(
                        f"targets.{target.name}.name: no pattern of a raster has {{{keys.name}}}"
                        f"{did_you_mean(keys.name, names)}"
                    )
                index = Labels.of(target, keys).class_of(names[keys.name], key)
                found[target.name] = np.array([index], np.int16)
            if target.of is None and _is_missing(target, found[target.name]):
                notes.append(f"{target.name} has no label")
        for target in self.spec.targets:
            if target.of is not None:
                found[target.name] = shares_of(target, self.spec.target(target.of), found[target.of])
        return {t.name: found[t.name] for t in self.spec.targets}, places

    def _stack(self, target: Target, key: str) -> Stack:
        assert target.resolution_m is not None  # config.py asks for it
        size = round(self.spec.tile_m / target.resolution_m)
        stack = read_stack(self.images[target.name], key, size, target.resolution_m)
        if len(stack.values) != 1:
            raise DatasetError(
                f"{stack.address}: tile {key} has {len(stack.values)} images of {target.name}, expected 1; fix the "
                "pattern",
                "several images of a target",
            )
        return stack


def _is_missing(target: Target, found: np.ndarray) -> bool:
    """Whether a tile has no label at all, where labels are of tiles."""
    if target.kind == "classification":
        return bool((found == MISSING_CLASS).all())
    return target.kind == "regression" and bool(np.isnan(found).all())


def label_image(target: Target, keys: TargetKeys, stack: Stack, notes: list[str]) -> np.ndarray:
    """(H, W) of the one image of ``stack``: uint8 class indices, or float32 numbers with NaN where there is none."""
    values = stack.values[0, 0]
    invalid = None if stack.invalid is None else stack.invalid[0, 0]
    if target.kind == "regression":
        numbers = values.astype(np.float32) * np.float32(keys.scale)
        if invalid is not None:
            numbers[invalid] = np.nan
        return numbers
    return Labels.of(target, keys).map_of(values, invalid, stack.address, notes)


def shares_of(target: Target, source: Target, labels: np.ndarray) -> np.ndarray:
    """(classes,) float32: the shares of a label image (H, W) that classes of ``target`` cover."""
    counts = np.bincount(labels.reshape(-1), minlength=len(source.classes)) / labels.size
    return counts[[source.classes.index(name) for name in target.classes]].astype(np.float32)


@dataclass(frozen=True)
class TableLabels:
    """The labels of a target in a table: ``columns`` of texts, looked up by tile."""

    target: Target
    keys: TargetKeys
    table: Table
    rows: KeyedRows
    columns: tuple[str, ...]

    @classmethod
    def load(cls, target: Target, keys: TargetKeys, src: str, wanted: Sequence[str]) -> TableLabels:
        """Read the table of a target; ``wanted``: the tiles. DatasetError if it lacks a column, or all tiles."""
        section = keys.table
        assert section is not None
        columns = _columns(target, section)
        table = Table.read_below(src, section.file, section.key, columns)
        return cls(target, keys, table, KeyedRows(table, section.key, wanted), columns)

    def read(self, key: str) -> np.ndarray:
        """The target of one tile; a tile without a row has no label. DatasetError for two rows, or a wrong value."""
        rows = self.rows.rows(key)
        where = f"{self.table.address}: {key}"
        if len(rows) > 1:
            raise DatasetError(f"{where}: has {len(rows)} rows; remove the repeats", "two rows of one tile")
        texts = [self.table.columns[c][rows[0]] if rows else "" for c in self.columns]
        if self.target.kind == "classification":
            return np.array([Labels.of(self.target, self.keys).class_of(texts[0], where)], np.int16)
        if self.target.kind == "regression":
            return np.array([_number(texts[0], where, self.target.name) * self.keys.scale], np.float32)
        if not rows:
            raise DatasetError(
                f"{where}: has no row, and {self.target.name} has no value for an unknown share; add it, or remove the "
                "tile",
                "no label",
            )
        if (
            len(self.columns) == len(self.target.classes)
            and self.keys.table
            and self.keys.table.column is None
        ):
            numbers = [_number(t, where, c) for t, c in zip(texts, self.columns, strict=True)]
            if all(map(math.isnan, numbers)):
                raise DatasetError(
                    f"{where}: has a row, but no share of any class of {self.target.name}; add them, or remove "
                    "the tile",
                    "no label",
                )
            return np.nan_to_num(np.array(numbers, np.float32), nan=0.0)
        labels = Labels.of(self.target, self.keys)
        shares = np.zeros(len(self.target.classes), np.float32)
        for text in self._present(texts[0]):
            index = labels.class_of(text, where)
            if index != MISSING_CLASS:
                shares[index] = 1
        return shares

    def _present(self, cell: str) -> list[str]:
        """The classes in one cell: separated, or a list as Python or JSON writes it."""
        cell = cell.strip().strip("[]()")
        names = [part.strip(" '\"") for part in re.split(r"[,;|]", cell)]
        if len(names) == 1 and names[0] not in Labels.of(self.target, self.keys).classes:
            names = cell.split()
        return [name for name in names if name]


def _columns(target: Target, section: TableTarget) -> tuple[str, ...]:
    if section.column is not None:
        return (section.column,)
    return section.columns or target.classes


def _number(text: str, where: str, name: str) -> float:
    if text.strip().lower() in _MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        raise DatasetError(
            f"{where}: {name} is {shorten(text)}, not a number; fix the table", "not a number"
        ) from None
    if math.isinf(number):
        raise DatasetError(f"{where}: {name} is infinite; leave it empty, or fix the table", "not a number")
    return number


def _known(labels: Mapping[int, Any]) -> str:
    names = [str(label) for label in sorted(labels)]
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
