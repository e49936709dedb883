"""Bounded reading of NumPy files, without pickles."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

from maestro_scale.errors import shorten
from maestro_scale.untrusted.documents import check_regular
from maestro_scale.untrusted.limits import ARCHIVE_BYTES, ARCHIVE_MEMBERS, InputError, size_text
from maestro_scale.untrusted.zip import open_zip

if TYPE_CHECKING:
    import numpy as np  # imported by the functions: `maestro-scale --help` starts without it

# A header may hold any Python literal, such as a shape of truth values: a TypeError.
_PLAIN_FLAGS = 0x808  # the size follows the data; the name is UTF-8
_DAMAGED = (
    ValueError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    KeyError,
    SyntaxError,
    NotImplementedError,
)


def open_npy(path: Path, mode: Literal["r", "r+"] = "r") -> np.memmap:
    """The array of an ``.npy`` file, mapped: a header cannot claim more than the file has. InputError; OSError."""
    import numpy as np

    check_regular(path)
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except _DAMAGED as error:
        raise InputError(f"{path}: is not an array ({shorten(str(error), 200)})") from None
    if not isinstance(array, np.memmap):
        array.close()
        raise InputError(f"{path}: is an archive, expected one array")
    return array


class NpyLayout(NamedTuple):
    """Where the elements of an ``.npy`` file are: from byte ``offset`` on, in C order unless ``fortran_order``."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int


def npy_layout(file: BinaryIO, num_bytes: int) -> NpyLayout:
    """The header of an open ``.npy`` file of ``num_bytes``. InputError if it is none, holds objects, or claims more
    than the file has; OSError."""
    import numpy as np

    try:
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
        offset = file.tell()
        needed = math.prod(shape) * dtype.itemsize
    except _DAMAGED as error:
        raise InputError(f"is not an array ({shorten(str(error), 200)})") from None
    if dtype.hasobject or min(shape, default=0) < 0 or offset + needed > num_bytes:
        raise InputError(f"does not have the bytes of its shape {shape}, or holds objects")
    return NpyLayout(shape, dtype, fortran_order, offset)


class NpzArrays:
    """The arrays of an open ``.npz`` file by name. All methods raise InputError or OSError.

    ``max_bytes``: of each array, decompressed.
    """

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        try:
            with open_zip(file, ARCHIVE_MEMBERS) as archive:
                members = archive.namelist()
        except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"is not an archive of arrays ({shorten(str(error), 200)})") from None
        self.names = tuple(n.removesuffix(".npy") for n in members if n.endswith(".npy"))

    def load(self, name: str) -> np.ndarray:
        """One array."""
        try:
            return _members(self._file, [name], self._max_bytes)[0]
        except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{name} cannot be read ({shorten(str(error), 200)})") from None


def load_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an ``.npz`` file by name. InputError if one is missing, damaged or above ``ARCHIVE_BYTES``; OSError."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            return _members(file, names, ARCHIVE_BYTES)
    except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({shorten(str(error), 200)})") from None


def parse_npz(content: bytes, names: Sequence[str], max_bytes: int = ARCHIVE_BYTES) -> list[np.ndarray]:
    """As :func:`load_npz`, of the content of a file, which the caller can hash first. ``max_bytes``: of each array."""
    try:
        return _members(io.BytesIO(content), names, max_bytes)
    except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"is not an archive of arrays ({shorten(str(error), 200)})") from None


def _members(file: BinaryIO, names: Sequence[str], max_bytes: int) -> list[np.ndarray]:
    with open_zip(file, ARCHIVE_MEMBERS) as archive:
        return [_member(archive, f"{name}.npy", max_bytes) for name in names]


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    import numpy as np

    # What numpy writes. Encrypted, patched or otherwise compressed members raise errors of their own kinds.
    info = archive.getinfo(name)
    is_plain = not info.flag_bits & ~_PLAIN_FLAGS
    if not is_plain or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{name} is not stored in a way that numpy writes")
    with archive.open(name) as file:
        content = file.read(max_bytes + 1)  # the size in the directory may be wrong
    if len(content) > max_bytes:
        raise InputError(f"{name} has more than {size_text(max_bytes)}")
    header = io.BytesIO(content)
    version = np.lib.format.read_magic(header)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(header)
    # Reading allocates what the header claims.
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - header.tell():
        raise InputError(f"{name} does not have the bytes of its shape {shape}")
    return np.load(io.BytesIO(content), allow_pickle=False)
