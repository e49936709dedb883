"""On-disk format of the training state: safetensors files of parameter slices and an index, for any number of ranks.

``rank00000.safetensors`` … contain 1-D fp32 tensors ``<kind>/<parameter>`` (kind: ``weight``, ``exp_avg``,
``exp_avg_sq``, ``ema``); the index says which elements of which parameter each of them has. Parameters are
identified by name and element range, not by rank or ZeRO partition, so that a run can resume with another ZeRO stage
or number of ranks. Nothing is pickled.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.interop.state_index import INDEX, FileSlices, StateIndex
from maestro_scale.interop.tensors import write_tensors_hashed

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
) -> tuple[FileSlices, dict[str, dict[str, Any]]]:
    """Write the slices of one rank, at most one per parameter.

    Returns (what its file has, {name: bytes and sha256} of it). A rank without slices writes no file. OSError.
    """
    name = f"rank{rank:05d}.safetensors"
    tensors = {f"{kind}/{p.name}": t for p in slices for kind, t in p.values.items()}
    written = {name: write_tensors_hashed(tensors, folder / name)} if slices else {}
    of_file = FileSlices(
        name,
        tuple(slices[0].values) if slices else (),
        tuple(p.name for p in slices),
        tuple(p.shape for p in slices),
        np.array([p.start for p in slices], np.int64),
        np.array([p.numel for p in slices], np.int64),
    )
    return of_file, written


class StateReader:
    """Context manager that reads any elements of any parameter and opens only the files that contain them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, ExitStack()
        self._files: dict[str, Any] = {}  # safetensors does not export the type of its handles
        self._index = StateIndex.read(folder)
        self.adam_step: int = self._index.adam_step
        self.kinds: tuple[str, ...] = self._index.kinds

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return dict(self._index.shapes)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter; (numel,) fp32 on the CPU."""
        parts = []
        for file, first, end in self._index.overlapping(name, start, numel):
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
        shape = self._index.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).reshape(shape)

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
