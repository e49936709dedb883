"""The training state on disk: safetensors files of parameter fragments and one index, read by any number of ranks.

``rank00000.safetensors`` … hold 1-D fp32 tensors ``<kind>/<parameter>``; ``index.json`` says which elements of which
parameter each of them is. No pickles, and no trace of the ZeRO stage or the number of ranks that wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from maestro_scale.interop.tensors import write_tensors

INDEX = "index.json"
WEIGHT = "weight"


@dataclass(frozen=True)
class ParameterSlice:
    """Some elements of one flattened parameter, one tensor (numel,) per kind."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]

    @property
    def numel(self) -> int:
        """Elements of it."""
        return len(next(iter(self.values.values())))


def write_slices(
    folder: Path, rank: int, pieces: list[ParameterSlice]
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Write one rank's pieces (at most one a parameter); (the file, None where there are none; its index entries)."""
    if not pieces:
        return None, []
    path = folder / f"rank{rank:05d}.safetensors"
    write_tensors({f"{kind}/{p.name}": t for p in pieces for kind, t in p.values.items()}, path)
    entries = [
        {"name": p.name, "shape": list(p.shape), "file": path.name, "start": p.start, "numel": p.numel}
        for p in pieces
    ]
    return path, entries


def write_index(folder: Path, entries: list[dict[str, Any]], kinds: list[str], adam_step: int) -> Path:
    """Write the index over all ranks' entries. ValueError where they are not every element exactly once."""
    parameters: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda e: (e["name"], e["start"])):
        parameter = parameters.setdefault(entry["name"], {"shape": entry["shape"], "pieces": []})
        parameter["pieces"].append([entry["file"], entry["start"], entry["numel"]])
    for name, parameter in parameters.items():
        reached = 0
        for _, start, numel in parameter["pieces"]:
            if start != reached:
                raise ValueError(
                    f"{name}: its pieces meet at element {reached}, but the next begins at {start}"
                )
            reached += numel
        if reached != math.prod(parameter["shape"]):
            raise ValueError(f"{name}: {reached} elements in pieces of a parameter of {parameter['shape']}")
    path = folder / INDEX
    path.write_text(json.dumps({"adam_step": adam_step, "kinds": kinds, "parameters": parameters}))
    return path


class StateReader:
    """Reads any elements of any parameter; opens only the files that hold them. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files, self._open = folder, {}, ExitStack()
        index = json.loads((folder / INDEX).read_text())
        self.adam_step: int = index["adam_step"]
        self.kinds: tuple[str, ...] = tuple(index["kinds"])
        self._parameters = index["parameters"]

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{parameter: shape}."""
        return {name: tuple(p["shape"]) for name, p in self._parameters.items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements ``start`` to ``start + numel`` of a flattened parameter's ``kind``; (numel,) fp32 on the CPU."""
        parts = [
            self._file(file).get_slice(f"{kind}/{name}")[first:end]
            for file, first, end in self._within(name, start, numel)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_full(self, kind: str, name: str) -> Tensor:
        """A parameter's ``kind`` in its own shape, fp32 on the CPU."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).reshape(shape)

    def _within(self, name: str, start: int, numel: int) -> Iterator[tuple[str, int, int]]:
        for file, begins, held in self._parameters[name]["pieces"]:
            first, end = max(start, begins), min(start + numel, begins + held)
            if first < end:
                yield file, first - begins, end - begins

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._open.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._files[name]
