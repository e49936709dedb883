"""On-disk format of the training state: safetensors files of parameter slices and one index, for any number of ranks.

``rank00000.safetensors`` … contain 1-D fp32 tensors ``<kind>/<parameter>`` (kind: ``weight``, ``exp_avg``,
``exp_avg_sq``, ``ema``); ``index.json`` says which elements of which parameter each of them has. Parameters are
identified by name and element range, not by rank or ZeRO partition, so that a run can resume with another ZeRO stage
or number of ranks. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.interop.tensors import write_tensors

INDEX = "index.json"
_FILE = re.compile(r"rank\d{5,8}\.safetensors")
WEIGHT = "weight"


@dataclass(frozen=True)
class ParameterSlice:
    """Consecutive elements of one flattened parameter, from ``start``; ``values``: one tensor (numel,) per kind."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return len(next(iter(self.values.values())))


def write_slices(
    folder: Path, rank: int, slices: list[ParameterSlice]
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Write the slices of one rank, at most one per parameter.

    Returns (file, or None if there are no slices; index entries).
    """
    if not slices:
        return None, []
    path = folder / f"rank{rank:05d}.safetensors"
    write_tensors({f"{kind}/{p.name}": t for p in slices for kind, t in p.values.items()}, path)
    entries = [
        {"name": p.name, "shape": list(p.shape), "file": path.name, "start": p.start, "numel": p.numel}
        for p in slices
    ]
    return path, entries


def write_index(folder: Path, entries: list[dict[str, Any]], kinds: list[str], adam_step: int) -> Path:
    """Write the index of all ranks' entries. ValueError unless they cover every element exactly once."""
    parameters: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda e: (e["name"], e["start"])):
        parameter = parameters.setdefault(entry["name"], {"shape": entry["shape"], "pieces": []})
        parameter["pieces"].append([entry["file"], entry["start"], entry["numel"]])
    for name, parameter in parameters.items():
        reached = 0
        for _, start, numel in parameter["pieces"]:
            if start != reached:
                raise ValueError(
                    f"{name}: its slices cover the elements up to {reached}, but the next one starts at {start}"
                )
            reached += numel
        if reached != math.prod(parameter["shape"]):
            raise ValueError(
                f"{name}: its slices have {reached} elements, but its shape is {parameter['shape']}"
            )
    path = folder / INDEX
    path.write_text(json.dumps({"adam_step": adam_step, "kinds": kinds, "parameters": parameters}))
    return path


@dataclass(frozen=True)
class _Parameter:
    """``pieces``: (file, first element, number of elements), which cover the parameter in order."""

    shape: tuple[int, ...]
    pieces: tuple[Any, ...]


@dataclass(frozen=True)
class _Index:
    """Content of ``index.json``; the attributes are the JSON keys."""

    adam_step: int
    kinds: tuple[str, ...]
    parameters: Mapping[str, _Parameter]


def _check_pieces(name: str, parameter: _Parameter) -> None:
    """InputError unless the pieces are of one file each and cover every element exactly once."""
    reached = 0
    files = set()
    for piece in parameter.pieces:
        valid = isinstance(piece, list) and [type(part) for part in piece] == [str, int, int]
        if (
            not valid
            or piece[1] != reached
            or piece[2] < 1
            or not _FILE.fullmatch(piece[0])
            or piece[0] in files
        ):
            raise untrusted.InputError(
                f"{shorten(name)}: {shorten(piece)} is not the next slice of the parameter"
            )
        files.add(piece[0])
        reached += piece[2]
    if min(parameter.shape, default=0) < 0 or reached != math.prod(parameter.shape):
        raise untrusted.InputError(
            f"{shorten(name)}: {reached} elements for the shape {shorten(parameter.shape)}"
        )


class StateReader:
    """Context manager that reads any elements of any parameter and opens only the files that contain them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, ExitStack()
        self._files: dict[str, Any] = {}  # safetensors does not export the type of its handles
        try:
            index = untrusted.from_builtins(_Index, untrusted.read_json(folder / INDEX))
            for name, parameter in index.parameters.items():
                _check_pieces(name, parameter)
        except untrusted.InputError as error:
            raise untrusted.InputError(f"{folder / INDEX}: {error}") from None
        self.adam_step: int = index.adam_step
        self.kinds: tuple[str, ...] = index.kinds
        self._parameters = index.parameters

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return {name: p.shape for name, p in self._parameters.items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter; (numel,) fp32 on the CPU."""
        parts = []
        for file, first, end in self._overlapping(name, start, numel):
            part = self._part(file, f"{kind}/{name}", first, end)
            if part.shape != (end - first,) or part.dtype != torch.float32:
                raise untrusted.InputError(
                    f"{self._folder / file}: {kind}/{name} has {tuple(part.shape)} {part.dtype} where {INDEX} has "
                    f"{end - first} elements"
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def read_full(self, kind: str, name: str) -> Tensor:
        """A full parameter in its shape, fp32 on the CPU."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).reshape(shape)

    def _overlapping(self, name: str, start: int, numel: int) -> Iterator[tuple[str, int, int]]:
        for file, offset, length in self._parameters[name].pieces:
            first, end = max(start, offset), min(start + numel, offset + length)
            if first < end:
                yield file, first - offset, end - offset

    def _part(self, file: str, tensor: str, first: int, end: int) -> Tensor:
        handle = self._file(file)
        try:
            return handle.get_slice(tensor)[first:end]
        except (SafetensorError, IndexError, TypeError) as error:  # no such tensor; not one axis
            raise untrusted.InputError(
                f"{self._folder / file}: {tensor} cannot be read ({' '.join(str(error).split())})"
            ) from None

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._open.enter_context(untrusted.open_tensors(self._folder / name))
        return self._files[name]
