"""Which elements of which parameter each file of a training state has.

``index.json`` names parameters and files; ``slices.safetensors`` has integers for each slice, of which a model of 600
parameters on 1,024 ranks has 600,000. In states of earlier revisions, ``index.json`` has the slices too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.interop.tensors import write_bytes_hashed, write_tensors_hashed

INDEX = "index.json"
SLICES = "slices.safetensors"
_FILE = re.compile(r"rank\d{5,8}\.safetensors")


@dataclass(frozen=True)
class FileSlices:
    """The slices in one file, at most one per parameter: the elements [starts[i], starts[i] + sizes[i]) of the
    flattened parameter names[i], whose shape is shapes[i]. ``kinds``: of the tensors of each slice."""

    file: str
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class StateIndex:
    """The slices of all files, ordered by parameter and first element.

    ``shapes``: of each parameter. ``first`` (parameters + 1,): the slices of parameter p are the rows [first[p],
    first[p + 1]) of ``file``, numbers of ``files``, and ``start``, first elements. A slice ends where the next one of
    its parameter starts, so that the slices of a parameter cover it exactly once.
    """

    adam_step: int
    kinds: tuple[str, ...]
    files: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    first: np.ndarray
    file: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, slices: Sequence[FileSlices], adam_step: int) -> StateIndex:
        """The index of all files. ValueError unless their slices cover every element exactly once."""
        slices = [part for part in slices if part.names]
        shapes = {name: shape for part in slices for name, shape in zip(part.names, part.shapes, strict=True)}
        shapes = dict(sorted(shapes.items()))
        numbers = {name: i for i, name in enumerate(shapes)}
        known: dict[tuple[str, ...], np.ndarray] = {}  # with ZeRO stage 3 all ranks have the same names
        for part in slices:
            if part.names not in known:
                known[part.names] = np.array([numbers[name] for name in part.names], np.int64)
        parameter = np.concatenate([known[part.names] for part in slices])
        start = np.concatenate([part.starts for part in slices])
        size = np.concatenate([part.sizes for part in slices])
        file = np.repeat(np.arange(len(slices)), [len(part.names) for part in slices])
        order = np.lexsort((start, parameter))
        parameter, start, size, file = (a[order] for a in (parameter, start, size, file))
        first = np.searchsorted(parameter, np.arange(len(shapes) + 1))
        _check_cover(list(shapes.items()), first, start, size)
        return cls(
            adam_step, slices[0].kinds, tuple(part.file for part in slices), shapes, first, file, start
        )

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write the files of the index; returns {name: bytes and sha256}, as ``write_tensors_hashed``."""
        head = {"adam_step": self.adam_step, "kinds": self.kinds, "files": self.files, "shapes": self.shapes}
        text = json.dumps(head).encode()
        arrays = {"first": self.first, "file": self.file, "start": self.start}
        tensors = {name: torch.from_numpy(a.astype(np.int64)) for name, a in arrays.items()}
        return {
            INDEX: write_bytes_hashed(text, folder / INDEX),
            SLICES: write_tensors_hashed(tensors, folder / SLICES),
        }

    @classmethod
    def read(cls, folder: Path) -> StateIndex:
        """The index of a state of any revision. InputError, naming the file, if it is damaged."""
        path = folder / INDEX
        try:
            content = untrusted.field_of(untrusted.read_json(path), dict)
            if "parameters" in content:
                return _of_earlier(untrusted.from_builtins(_EarlierIndex, content))
            head = untrusted.from_builtins(_Head, content)
            path = folder / SLICES
            tensors = untrusted.load_tensors(path)
            arrays = [_integers(tensors, name) for name in ("first", "file", "start")]
            index = cls(head.adam_step, head.kinds, head.files, head.shapes, *arrays)
            index._check()
        except untrusted.InputError as error:
            raise untrusted.InputError(f"{path}: {error}") from None
        return index

    def overlapping(self, name: str, start: int, size: int) -> Iterator[tuple[str, int, int]]:
        """(file, first, end) of the elements [start, start + size) of a parameter, as positions in its slice of each
        file, in order."""
        number = self._numbers[name]
        rows = slice(self.first[number], self.first[number + 1])
        starts, files = self.start[rows], self.file[rows]
        ends = np.append(starts[1:], math.prod(self.shapes[name]))
        # Of the slices before, none overlaps.
        for i in range(max(int(np.searchsorted(starts, start, side="right")) - 1, 0), len(starts)):
            if starts[i] >= start + size:
                return
            first, end = max(start, int(starts[i])), min(start + size, int(ends[i]))
            if first < end:
                yield self.files[files[i]], first - int(starts[i]), end - int(starts[i])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.shapes)}

    def _check(self) -> None:
        """InputError unless the arrays are what their names say."""
        names, sizes = list(self.shapes), [math.prod(shape) for shape in self.shapes.values()]
        if bad := next((f for f in self.files if not _FILE.fullmatch(f)), None):
            raise untrusted.InputError(f"{shorten(bad)} is not the name of a file of a state")
        if len(set(self.files)) != len(self.files):
            raise untrusted.InputError("lists a file twice")
        if any(map(_is_impossible, self.shapes.values())):
            raise untrusted.InputError("has a shape that no parameter can have")
        first, file, start = self.first, self.file, self.start
        if len(first) != len(names) + 1 or len(file) != len(start):
            raise untrusted.InputError("its arrays do not fit together")
        if first[0] != 0 or first[-1] != len(start) or (np.diff(first) < 0).any():
            raise untrusted.InputError("its parameters do not cover its slices")
        counts = np.diff(first)
        parameter = np.repeat(np.arange(len(names)), counts)
        begins = np.r_[True, np.diff(parameter) > 0][: len(start)]
        # Where a slice has to start at least: at 0, or after an element of the slice before.
        behind = np.where(begins, 0, np.r_[0, start[:-1] + 1][: len(start)])
        wrong = (start < behind) | (begins & (start > 0)) | (start >= np.array(sizes, np.int64)[parameter])
        wrong |= (file < 0) | (file >= len(self.files))
        order = np.lexsort((file, parameter))
        twice = (np.diff(parameter[order]) == 0) & (np.diff(file[order]) == 0)
        wrong[order[1:][twice]] = True
        empty = (counts == 0) & (np.array(sizes, np.int64) > 0)
        if wrong.any() or empty.any():
            number = int(parameter[wrong.argmax()] if wrong.any() else empty.argmax())
            raise untrusted.InputError(f"{shorten(names[number])}: its slices do not cover it exactly once")


@dataclass(frozen=True)
class _Head:
    """Content of ``index.json``; the attributes are the JSON keys."""

    adam_step: int
    kinds: tuple[str, ...]
    files: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Parameter:
    """``pieces``: (file, first element, number of elements), which cover the parameter in order."""

    shape: tuple[int, ...]
    pieces: tuple[Any, ...]


@dataclass(frozen=True)
class _EarlierIndex:
    """Content of ``index.json`` in states of earlier revisions; the attributes are the JSON keys."""

    adam_step: int
    kinds: tuple[str, ...]
    parameters: Mapping[str, _Parameter]


def _of_earlier(earlier: _EarlierIndex) -> StateIndex:
    """InputError unless the pieces are of one file each and cover every element exactly once."""
    files: dict[str, int] = {}
    first, file, start = [0], [], []
    for name, parameter in earlier.parameters.items():
        reached = 0
        own = set()
        for piece in parameter.pieces:
            valid = isinstance(piece, list) and [type(part) for part in piece] == [str, int, int]
            if (
                not valid
                or piece[1] != reached
                or piece[2] < 1
                or not _FILE.fullmatch(piece[0])
                or piece[0] in own
            ):
                raise untrusted.InputError(
                    f"{shorten(name)}: {shorten(piece)} is not the next slice of the parameter"
                )
            own.add(piece[0])
            file.append(files.setdefault(piece[0], len(files)))
            start.append(reached)
            reached += piece[2]
        if _is_impossible(parameter.shape) or reached != math.prod(parameter.shape):
            raise untrusted.InputError(
                f"{shorten(name)}: {reached} elements for the shape {shorten(parameter.shape)}"
            )
        first.append(len(start))
    shapes = {name: parameter.shape for name, parameter in earlier.parameters.items()}
    arrays = (np.array(values, np.int64) for values in (first, file, start))
    return StateIndex(earlier.adam_step, earlier.kinds, tuple(files), shapes, *arrays)


def _is_impossible(shape: tuple[int, ...]) -> bool:
    return min(shape, default=0) < 0 or math.prod(shape) >= 2**62


def _check_cover(
    shapes: Sequence[tuple[str, tuple[int, ...]]], first: np.ndarray, start: np.ndarray, size: np.ndarray
) -> None:
    """ValueError, naming the first parameter whose slices do not cover it exactly once."""
    ends = start + size
    expected = np.r_[0, ends[:-1]]
    expected[first[:-1]] = 0
    if (gaps := start != expected).any():
        row = int(gaps.argmax())
        name = shapes[int(np.searchsorted(first, row, side="right")) - 1][0]
        raise ValueError(
            f"{name}: its slices cover the elements up to {expected[row]}, but the next one starts at {start[row]}"
        )
    for (name, shape), end in zip(shapes, ends[first[1:] - 1], strict=True):
        if end != math.prod(shape):
            raise ValueError(f"{name}: its slices have {end} elements, but its shape is {list(shape)}")


def _integers(tensors: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != torch.int64 or tensor.ndim != 1:
        raise untrusted.InputError(f"has no list of integers {name}")
    return tensor.numpy()
