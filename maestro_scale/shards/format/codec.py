"""Sample format: one safetensors buffer per tile, decoded field by field on access.

The container is plain safetensors, so any safetensors library opens it. Its ``__metadata__`` holds ``key``,
``place`` (JSON: the tile's location, if the source gives it) and, if fields are compressed, ``encoded``: a JSON object
from field name to :class:`.compress.FieldEncoding`; such a field is stored as a flat U8 tensor. Field names are
defined in :mod:`.fields`.

Fields are decoded lazily because a training step uses a few of a series' many dates and a crop of a large tile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NoReturn

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import GeoOrigin, Tile
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.compress import (
    CODECS,
    Window,
    compress,
    decompress_all,
    decompress_rows,
)
from maestro_scale.shards.format.fields import tile_fields
from maestro_scale.shards.format.header import (
    FROM_SAFETENSORS,
    TO_SAFETENSORS,
    ByteReader,
    StoredField,
    read_header,
)

_MIN_COMPRESSED_BYTES = 4096  # smaller fields stay raw: compression would save nothing and cost a call
# Gap between the windows of two images, or between two entries; a smaller one is read as well, since that takes no
# longer than a second call.
_MAX_GAP_BYTES = 16 * 1024


def encode(tile: Tile, codec: str = "raw") -> bytes:
    """Encode a tile as a safetensors buffer, deterministically. CodecError for an unsupported dtype."""
    try:
        return encode_fields(tile.key, tile_fields(tile), codec, tile.origin)
    except CodecError as error:
        raise CodecError(f"tile {tile.key}: {error}") from error


def encode_fields(
    key: str, fields: Mapping[str, np.ndarray], codec: str = "raw", origin: GeoOrigin | None = None
) -> bytes:
    """Encode named arrays as a safetensors buffer; metadata: ``key`` and, if given, ``origin`` (as ``place``)."""
    if codec not in CODECS:
        raise CodecError(f"there is no codec {codec!r}; use one of: {', '.join(CODECS)}")
    metadata = {"key": key}
    if origin is not None:
        metadata["place"] = json.dumps(asdict(origin))
    encoded: dict[str, dict] = {}
    stored: dict[str, tuple[str, list[int], bytes | np.ndarray]] = {}
    for name, array in fields.items():
        if array.dtype.name not in TO_SAFETENSORS:
            raise CodecError(
                f"field {name} has dtype {array.dtype}; supported are {', '.join(TO_SAFETENSORS)}"
            )
        # safetensors is little-endian.
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        stored[name] = (TO_SAFETENSORS[array.dtype.name], list(array.shape), array)
        if codec != "raw" and array.nbytes >= _MIN_COMPRESSED_BYTES and array.ndim:
            encoding, data = compress(array, codec)
            # Noise does not compress: then the raw field is smaller and faster to read.
            if len(data) < array.nbytes:
                encoded[name] = asdict(encoding)
                stored[name] = ("U8", [len(data)], data)
    if encoded:
        metadata["encoded"] = json.dumps(encoded, sort_keys=True, separators=(",", ":"))
    return _pack(metadata, stored)


def _pack(metadata: dict[str, str], stored: dict[str, tuple[str, list[int], bytes | np.ndarray]]) -> bytes:
    # Wide dtypes first, as the safetensors library does: then every tensor is aligned to its item size and can be used
    # as a view of the buffer.
    order = sorted(stored, key=lambda name: (-FROM_SAFETENSORS[stored[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    parts: list[bytes | memoryview] = []
    end = 0
    for name in order:
        code, shape, data = stored[name]
        part = data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + len(part)]}
        end += len(part)
        parts.append(part)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def parse_place(key: str, place: str | None) -> GeoOrigin | None:
    """The location of a tile from its stored text (``Sample.place``). CodecError, with ``key``, if it is malformed."""
    if place is None:
        return None
    try:
        return untrusted.from_builtins(GeoOrigin, untrusted.load_json(place, limits=untrusted.HEADER))
    except untrusted.InputError as error:
        raise CodecError(f"sample {key}: its place cannot be read ({error})") from None


class Sample:
    """One encoded tile. Fields are read and decoded on access.

    ``buffer``: bytes, a memoryview of them, or a :class:`.header.ByteReader`, of which only the requested fields, dates
    and windows are read. ``place``: the location of the tile as it is stored, see ``parse_place``. ``layout``: shared
    by samples with the same fields, dtypes and shapes. CodecError if it is not a valid sample.
    """

    __slots__ = ("_fields", "_memory", "_source", "_start", "key", "layout", "place")

    def __init__(self, buffer: bytes | memoryview | ByteReader) -> None:
        self._memory: memoryview | None = None
        if isinstance(buffer, (bytes, bytearray, memoryview)):
            self._memory = memoryview(buffer).toreadonly()
            self._source: ByteReader = _MemoryReader(self._memory)
        else:
            self._source = buffer
        self.key, self.place, self.layout, self._start = read_header(self._source)
        self._fields = self.layout.fields

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields, as stored."""
        return self.layout.names

    @property
    def origin(self) -> GeoOrigin | None:
        """Location of the tile, if it was stored. CodecError if it cannot be parsed."""
        return parse_place(self.key, self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a decoded field."""
        return (self._fields.get(name) or self._missing(name)).shape

    def dtype(self, name: str) -> np.dtype:
        """Native dtype of a decoded field."""
        return self._dtype(name, self._fields.get(name) or self._missing(name))

    def array(self, name: str, window: Window | None = None) -> np.ndarray:
        """A field in its native dtype, or a ``window`` of its last two axes.

        A raw field of a buffer in memory is a read-only view.
        """
        field = self._fields.get(name) or self._missing(name)
        if field.encoding is not None:
            try:
                return decompress_all(field.encoding, self._reader(field), window)
            except CodecError as error:
                raise CodecError(f"sample {self.key}, field {name}: {error}") from error
        if window is None or self._memory is not None or len(field.shape) < 3:
            array = self._raw(name, field)
            return array if window is None else array[..., window[0], window[1]]
        return self._raw_rows(name, field, np.arange(field.shape[0]), window)

    def rows(self, name: str, indices: np.ndarray, window: Window | None = None) -> np.ndarray:
        """Entries ``indices`` (D,) of axis 0, shape (D, …), optionally a ``window`` of each, as a copy.

        Reads and decodes as little else as possible. Indices may repeat and be in any order. IndexError if one is
        negative or past the end.
        """
        indices, field = np.asarray(indices), self._fields.get(name) or self._missing(name)
        listed = indices.tolist()
        if listed and not 0 <= min(listed) <= max(listed) < field.shape[0]:
            raise IndexError(
                f"sample {self.key}: {name} has {field.shape[0]} entries, requested were {listed}"
            )
        if field.encoding is None:
            if self._memory is not None:
                array = self._raw(name, field)
                return (array if window is None else array[..., window[0], window[1]])[indices]
            return self._raw_rows(name, field, indices, window)
        try:
            return decompress_rows(field.encoding, self._reader(field), indices, window)
        except CodecError as error:
            raise CodecError(f"sample {self.key}, field {name}: {error}") from error

    def _missing(self, name: str) -> NoReturn:
        raise KeyError(f"sample {self.key} has no field {name!r}; it has: {', '.join(self.names)}")

    def _dtype(self, name: str, field: StoredField) -> np.dtype:
        if field.dtype is None:
            raise CodecError(f"sample {self.key}, field {name}: dtype {field.code} is not supported")
        return field.dtype

    def _reader(self, field: StoredField) -> Callable[[int, int], memoryview]:
        """A function that reads bytes [begin, end) of a stored field."""
        first = self._start + field.begin
        return lambda begin, end: self._source.read(first + begin, first + end)

    def _raw(self, name: str, field: StoredField) -> np.ndarray:
        dtype = self._dtype(name, field)
        if self._memory is not None:  # whose size the header agrees with
            return np.ndarray(field.shape, dtype, self._memory, self._start + field.begin)
        data = self._source.read(self._start + field.begin, self._start + field.end)
        try:
            array: np.ndarray = np.ndarray(field.shape, dtype, data)
        except TypeError as error:
            raise CodecError(
                f"sample {self.key}, field {name}: {len(data)} bytes for {dtype} {field.shape}"
            ) from error
        array.flags.writeable = False
        return array

    def _raw_rows(
        self, name: str, field: StoredField, indices: np.ndarray, window: Window | None
    ) -> np.ndarray:
        """Entries of axis 0, or a window of each, with as few reads as are worth their gaps."""
        dtype, (height, width) = self._dtype(name, field), (1, 1, *field.shape)[-2:]
        row_shape, first = field.shape[1:], self._start + field.begin
        row_bytes, line_bytes = math.prod(row_shape) * dtype.itemsize, width * dtype.itemsize
        if window is not None:
            top, bottom, _ = window[0].indices(height)
            if (height - bottom + top) * line_bytes >= _MAX_GAP_BYTES:
                # One read per image, of the window's rows of pixels only, since the gaps between them are large.
                images = np.arange(math.prod(row_shape[:-2])) * (height * line_bytes)
                starts = (indices[:, None] * row_bytes + images + (first + top * line_bytes)).reshape(-1)
                lines = _read_many(self._source, starts.tolist(), (bottom - top) * line_bytes)
                shape = (len(indices), *row_shape[:-2], bottom - top, width)
                return np.ndarray(shape, dtype, lines)[..., window[1]]
        listed = indices.tolist()
        low, high = (min(listed), max(listed) + 1) if listed else (0, 0)
        gaps = (high - low - len(listed)) * row_bytes
        if row_bytes < _MAX_GAP_BYTES and gaps <= _MAX_GAP_BYTES * (len(listed) - 1):
            # Small entries near each other, such as dates: one read of all between the first and the last.
            data = self._source.read(first + low * row_bytes, first + high * row_bytes)
            array = np.ndarray((high - low, *row_shape), dtype, data)[indices - low]
        else:
            rows = _read_many(self._source, [first + row * row_bytes for row in listed], row_bytes)
            array = np.ndarray((len(listed), *row_shape), dtype, rows)
        return array if window is None else array[..., window[0], window[1]]


def _read_many(source: ByteReader, begins: Sequence[int], size: int) -> np.ndarray | bytearray:
    """``size`` bytes from each place, one after the other; by one call if possible: a crop of a series has hundreds."""
    if (read := getattr(source, "read_many", None)) is not None:
        return read(begins, size)
    return bytearray().join(source.read(begin, begin + size) for begin in begins)


class _MemoryReader:
    """A :class:`.header.ByteReader` of bytes in memory."""

    __slots__ = ("_view",)

    def __init__(self, buffer: bytes | memoryview) -> None:
        self._view = memoryview(buffer)

    def __len__(self) -> int:
        return len(self._view)

    def read(self, begin: int, end: int) -> memoryview:
        return self._view[begin:end]
