"""NumPy arrays: ``.npy``, of which only what is asked for is read, and ``.npz``, whose arrays are read as a whole.

Pickled objects are refused. ``variable`` names the array of an ``.npz``; axes are band, y, x unless ``axes`` says more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.arrays import ArrayFile, list_arrays
from maestro_scale.datasets.sources.protocol import ImageRef
from maestro_scale.datasets.spec import DatasetError

_ZIP = b"PK"
ARRAY = "array"
"""What the array of an ``.npy`` file is called."""


def list_images(section: ImageFiles, src: str) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`."""
    return list_arrays(section, src, open_file)


@contextmanager
def open_file(address: str, section: ImageFiles) -> Iterator[ArrayFile]:
    """As :meth:`.protocol.Source.open_file`."""
    with remote.open_binary(address) as file:
        yield ArrayFile(open_store(file, address), section)


def open_store(file: BinaryIO, where: str) -> NumpyStore:
    """The arrays of an open file; DatasetError if it has none."""
    try:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        if file.read(2) == _ZIP:
            return NumpyStore(where, archive=untrusted.NpzArrays(file, untrusted.FIELD_BYTES))
        return NumpyStore(where, single=_NpyArray(file, untrusted.npy_layout(file, num_bytes)))
    except (untrusted.InputError, OSError) as error:
        raise DatasetError(f"{where}: cannot be read ({error}); fetch the file again") from error


class NumpyStore:
    """The array of an ``.npy`` file, or those of an ``.npz`` (an :class:`.arrays.ArrayStore`)."""

    errors = (OSError, ValueError, EOFError)

    def __init__(
        self, where: str, single: _NpyArray | None = None, archive: untrusted.NpzArrays | None = None
    ) -> None:
        self.where, self._single, self._archive = where, single, archive
        self._loaded: dict[str, MemoryArray] = {}

    def names(self) -> Sequence[str]:
        """Names of the arrays."""
        return [ARRAY] if self._archive is None else self._archive.names

    def find(self, name: str) -> MemoryArray | _NpyArray | None:
        """The array of this name."""
        if self._archive is None:
            return self._single if name == ARRAY else None
        if name not in self._archive.names:
            return None
        if name not in self._loaded:
            try:
                self._loaded[name] = MemoryArray(self._archive.load(name))
            except (untrusted.InputError, OSError) as error:
                raise DatasetError(f"{self.where}: {error}; fetch the file again") from error
        return self._loaded[name]

    def beside(self, name: str, other: str) -> str:
        return other


class MemoryArray:
    """An array in memory (an :class:`.arrays.StoredArray`)."""

    dimensions = None

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def attribute(self, name: str) -> Any:
        return None

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        return np.array(self._array[index])


class _NpyArray:
    """An array in an open file (an :class:`.arrays.StoredArray`)."""

    dimensions = None

    def __init__(self, file: BinaryIO, layout: untrusted.NpyLayout) -> None:
        self._file, self._layout = file, layout
        self.shape, self.dtype = layout.shape, layout.dtype

    def attribute(self, name: str) -> Any:
        return None

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        # An array in Fortran order is its transpose in C order.
        turned = self._layout.fortran_order
        found = self._read(self.shape[::-1] if turned else self.shape, index[::-1] if turned else index)
        return found.T if turned else found

    def _read(self, shape: Sequence[int], index: Sequence[int | slice]) -> np.ndarray:
        bounds = [(i, i + 1) if isinstance(i, int) else (i.start, i.stop) for i in index]
        sizes = [stop - start for start, stop in bounds]
        # The last axes that are read completely lie together with the one before them.
        last = len(shape) - 1
        while last > 0 and sizes[last] == shape[last]:
            last -= 1
        run = math.prod(sizes[last:]) if shape else 1
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        out = np.empty(math.prod(sizes), self.dtype)
        leading = itertools.product(*(range(*b) for b in bounds[:last]))
        for number, place in enumerate(leading):
            first = sum(i * stride for i, stride in zip(place, strides, strict=False))
            first += bounds[last][0] * strides[last] if shape else 0
            self._file.seek(self._layout.offset + first * self.dtype.itemsize)
            data = self._file.read(run * self.dtype.itemsize)
            if len(data) != run * self.dtype.itemsize:
                raise EOFError("the file is cut short")
            out[number * run : (number + 1) * run] = np.frombuffer(data, self.dtype)
        kept = [size for size, i in zip(sizes, index, strict=True) if not isinstance(i, int)]
        return out.reshape(kept)
