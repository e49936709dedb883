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
from typing import Protocol

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import GeoOrigin, Tile
from maestro_scale.errors import shorten
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.compress import (
    CODECS,
    FieldEncoding,
    Window,
    compress,
    decompress_all,
    decompress_rows,
    window_shape,
)
from maestro_scale.shards.format.fields import tile_fields
from maestro_scale.untrusted import TensorEntry

_TO_SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
_FROM_SAFETENSORS = {code: np.dtype(name) for name, code in _TO_SAFETENSORS.items()}
_MIN_COMPRESSED_BYTES = 4096  # smaller fields stay raw: compression would save nothing and cost a call
_HEADER_BYTES = 16 * 1024  # read by the first call; few headers are longer
# Gap between the windows of two images; a smaller one is read as well, since it takes no longer than a second call.
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
        if array.dtype.name not in _TO_SAFETENSORS:
            raise CodecError(
                f"field {name} has dtype {array.dtype}; supported are {', '.join(_TO_SAFETENSORS)}"
            )
        # safetensors is little-endian.
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        stored[name] = (_TO_SAFETENSORS[array.dtype.name], list(array.shape), array)
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
    order = sorted(stored, key=lambda name: (-_FROM_SAFETENSORS[stored[name][0]].itemsize, name))
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


class ByteReader(Protocol):
    """Random access to bytes that are not in memory, such as a part of a file."""

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end)."""
        ...


class Sample:
    """One encoded tile. Fields are read and decoded on access.

    ``buffer``: bytes, a memoryview of them, or a :class:`ByteReader`, of which only the requested fields, dates and
    windows are read. CodecError if it is not a valid sample.
    """

    __slots__ = ("_encodings", "_entries", "_source", "_start", "key", "names", "place")

    def __init__(self, buffer: bytes | memoryview | ByteReader) -> None:
        self._source = _MemoryReader(buffer) if isinstance(buffer, (bytes, bytearray, memoryview)) else buffer
        metadata, self._entries, self._start = _read_header(self._source)
        if not isinstance(metadata.get("key"), str):
            raise CodecError("the safetensors metadata has no 'key'; save with metadata={'key': …}")
        self.key: str = metadata["key"]
        self.place: str | None = metadata.get("place")
        """The location of the tile as it is stored: see ``parse_place``."""
        self.names: tuple[str, ...] = tuple(self._entries)
        self._encodings = (
            _parse_encodings(metadata["encoded"], self._entries) if "encoded" in metadata else {}
        )

    @property
    def origin(self) -> GeoOrigin | None:
        """Location of the tile, if it was stored. CodecError if it cannot be parsed."""
        return parse_place(self.key, self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a decoded field."""
        if name in self._encodings:
            return self._encodings[name].shape
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Native dtype of a decoded field."""
        if name in self._encodings:
            return np.dtype(self._encodings[name].dtype)
        return self._raw_dtype(name)

    def array(self, name: str, window: Window | None = None) -> np.ndarray:
        """A field in its native dtype, or a ``window`` of its last two axes.

        A raw field of a buffer in memory is a read-only view.
        """
        if name in self._encodings:
            try:
                return decompress_all(self._encodings[name], self._reader(name), window)
            except CodecError as error:
                raise CodecError(f"sample {self.key}, field {name}: {error}") from error
        if window is None or self._in_memory or len(self.shape(name)) < 3:
            array = self._raw(name)
            return array if window is None else array[..., window[0], window[1]]
        return self._raw_rows(name, np.arange(self.shape(name)[0]), window)

    def rows(self, name: str, indices: np.ndarray, window: Window | None = None) -> np.ndarray:
        """Entries ``indices`` (D,) of axis 0, shape (D, …), optionally a ``window`` of each, as a copy.

        Reads and decodes as little else as possible. Indices may repeat and be in any order. IndexError if one is
        negative or past the end.
        """
        indices = np.asarray(indices)
        num_rows = self.shape(name)[0]
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(
                f"sample {self.key}: {name} has {num_rows} entries, requested were {indices.tolist()}"
            )
        if name not in self._encodings:
            if self._in_memory:
                return self.array(name, window)[indices]
            return self._raw_rows(name, indices, window)
        try:
            return decompress_rows(self._encodings[name], self._reader(name), indices, window)
        except CodecError as error:
            raise CodecError(f"sample {self.key}, field {name}: {error}") from error

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(
                f"sample {self.key} has no field {name!r}; it has: {', '.join(self.names)}"
            ) from None

    def _reader(self, name: str) -> Callable[[int, int], memoryview]:
        """A function that reads bytes [begin, end) of a stored field."""
        first = self._start + self._entry(name).begin
        return lambda begin, end: self._source.read(first + begin, first + end)

    def _bytes(self, name: str) -> memoryview:
        entry = self._entry(name)
        return self._source.read(self._start + entry.begin, self._start + entry.end)

    def _raw_dtype(self, name: str) -> np.dtype:
        code = self._entry(name).dtype
        if code not in _FROM_SAFETENSORS:
            raise CodecError(f"sample {self.key}, field {name}: dtype {code} is not supported")
        return _FROM_SAFETENSORS[code]

    def _raw(self, name: str) -> np.ndarray:
        dtype, shape, data = self._raw_dtype(name), self._entry(name).shape, self._bytes(name)
        try:
            array = np.frombuffer(data, dtype).reshape(shape)
        except ValueError as error:
            raise CodecError(
                f"sample {self.key}, field {name}: {len(data)} bytes for {dtype} {shape}"
            ) from error
        array.flags.writeable = False
        return array

    @property
    def _in_memory(self) -> bool:
        return isinstance(self._source, _MemoryReader)

    def _raw_rows(self, name: str, indices: np.ndarray, window: Window | None) -> np.ndarray:
        read, shape, dtype = self._reader(name), self._entry(name).shape, self._raw_dtype(name)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        out = np.empty((len(indices), *window_shape(shape[1:], window)), dtype)
        if not out.size:
            return out
        if window is None or (shape[-2] - out.shape[-2]) * shape[-1] * dtype.itemsize < _MAX_GAP_BYTES:
            inside = (...,) if window is None else (..., *window)
            for row, index in zip(out, indices.tolist(), strict=True):
                data = read(index * row_bytes, (index + 1) * row_bytes)
                row[...] = np.frombuffer(data, dtype).reshape(shape[1:])[inside]
            return out
        # One read per image, of the window's rows of pixels only, since the gaps between them are large.
        first, stop, _ = window[0].indices(shape[-2])
        line_bytes = shape[-1] * dtype.itemsize
        images = out.reshape(-1, *out.shape[-2:])
        per_row = len(images) // max(len(indices), 1)
        starts = (indices[:, None] * row_bytes + np.arange(per_row) * shape[-2] * line_bytes).reshape(-1)
        starts += self._start + self._entry(name).begin + first * line_bytes
        lines = _read_many(self._source, starts.tolist(), (stop - first) * line_bytes)
        images[...] = np.frombuffer(lines, dtype).reshape(len(images), -1, shape[-1])[..., window[1]]
        return out


def _read_many(source: ByteReader, begins: Sequence[int], size: int) -> bytes:
    """``size`` bytes from each place, one after the other; by one call if possible: a crop of a series has hundreds."""
    if (read := getattr(source, "read_many", None)) is not None:
        return read(begins, size)
    return b"".join(source.read(begin, begin + size) for begin in begins)


class _MemoryReader:
    """A :class:`ByteReader` of bytes in memory."""

    __slots__ = ("_view",)

    def __init__(self, buffer: bytes | memoryview) -> None:
        self._view = memoryview(buffer)

    def __len__(self) -> int:
        return len(self._view)

    def read(self, begin: int, end: int) -> memoryview:
        return self._view[begin:end]


def _read_header(reader: ByteReader) -> tuple[dict[str, str], dict[str, TensorEntry], int]:
    """Metadata, tensor entries and data offset from a safetensors header, all bounds checked."""
    length = len(reader)
    first = reader.read(0, min(length, _HEADER_BYTES))
    size = int.from_bytes(first[:8], "little") if length >= 8 else -1
    if not 0 < size <= min(length - 8, untrusted.HEADER.bytes):
        raise CodecError(f"{length} bytes that do not start with a safetensors header")
    text = first[8 : 8 + size] if 8 + size <= len(first) else reader.read(8, 8 + size)
    try:
        metadata, entries = untrusted.parse_safetensors_header(bytes(text), length - 8 - size)
    except untrusted.InputError as error:
        raise CodecError(f"the safetensors header is not valid: {error}") from None
    return metadata, entries, 8 + size


def _parse_encodings(text: str, entries: Mapping[str, TensorEntry]) -> dict[str, FieldEncoding]:
    try:
        values = untrusted.load_json(text, limits=untrusted.HEADER)
        if not isinstance(values, dict):
            raise untrusted.InputError("is not an object")
        encoded = {name: untrusted.from_builtins(FieldEncoding, e) for name, e in values.items()}
    except untrusted.InputError as error:
        raise CodecError(f"the metadata entry 'encoded' cannot be read ({error})") from None
    for name, encoding in encoded.items():
        stored = entries.get(name)
        if stored is None or stored.dtype != "U8" or len(stored.shape) != 1:
            raise CodecError(
                f"the metadata entry 'encoded' has {shorten(name)}, which is not a tensor of bytes"
            )
        problem = encoding.problem()
        if problem is None and encoding.ends[-1] != stored.shape[0]:
            problem = f"its frames end at byte {encoding.ends[-1]} of {stored.shape[0]}"
        if problem is not None:
            raise CodecError(f"the metadata entry 'encoded' is inconsistent: {shorten(name)}: {problem}")
    return encoded
