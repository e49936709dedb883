"""A sample as bytes: one safetensors buffer per tile, read without a copy.

The container is plain safetensors, so any safetensors library opens it. Its ``__metadata__`` holds ``key``
and, if fields are compressed, ``encoded``: a JSON object from field name to
:class:`~maestro_scale.shards.compress.Encoded`; such a field is a flat U8 tensor. Fields are named as
:mod:`maestro_scale.shards.fields` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from maestro_scale.datasets.spec import Tile
from maestro_scale.shards.compress import CODECS, Encoded, compress, decompress_all, decompress_rows
from maestro_scale.shards.errors import CodecError, one_line
from maestro_scale.shards.fields import fields_of

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
DTYPES = tuple(_TO_SAFETENSORS)
_SMALL_BYTES = 4096  # fields below stay raw: a frame would save nothing and cost a call
_MAX_HEADER_BYTES = 16 * 1024 * 1024


def encode(tile: Tile, codec: str = "raw") -> bytes:
    """One tile as a safetensors buffer; the same tile gives the same bytes. CodecError if it cannot be."""
    try:
        return encode_fields(tile.key, fields_of(tile), codec)
    except CodecError as error:
        raise CodecError(f"tile {tile.key}: {error}") from error


def encode_fields(key: str, fields: Mapping[str, np.ndarray], codec: str = "raw") -> bytes:
    """Named arrays as a safetensors buffer whose metadata holds ``key``."""
    if codec not in CODECS:
        raise CodecError(f"no codec is called {codec!r}; there are: {', '.join(CODECS)}")
    metadata = {"key": key}
    encoded: dict[str, dict] = {}
    stored: dict[str, tuple[str, list[int], bytes | np.ndarray]] = {}
    for name, array in fields.items():
        if array.dtype.name not in _TO_SAFETENSORS:
            raise CodecError(f"field {name} has dtype {array.dtype}; storable are {', '.join(DTYPES)}")
        # Big-endian input is stored as what safetensors has, little-endian.
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        stored[name] = (_TO_SAFETENSORS[array.dtype.name], list(array.shape), array)
        if codec != "raw" and array.nbytes >= _SMALL_BYTES and array.ndim:
            how, data = compress(array, codec)
            if len(data) < array.nbytes:
                encoded[name] = asdict(how)
                stored[name] = ("U8", [len(data)], data)
    if encoded:
        metadata["encoded"] = json.dumps(encoded, sort_keys=True, separators=(",", ":"))
    return _pack(metadata, stored)


def _pack(metadata: dict[str, str], stored: dict[str, tuple[str, list[int], bytes | np.ndarray]]) -> bytes:
    # Wide dtypes first, as safetensors does: every tensor is then aligned to its own item size.
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


class Sample:
    """One tile in a buffer: nothing is decoded or copied until it is asked for.

    ``buffer``: bytes, or a memoryview over them (a slice of a memory map). CodecError if it is no sample.
    """

    __slots__ = ("_data", "_encoded", "_entries", "key", "names")

    def __init__(self, buffer: bytes | memoryview) -> None:
        view = memoryview(buffer)
        metadata, self._entries, start = _read_header(view)
        self._data = view[start:]
        if not isinstance(metadata.get("key"), str):
            raise CodecError("the safetensors metadata has no 'key'; save with metadata={'key': …}")
        self.key: str = metadata["key"]
        self.names: tuple[str, ...] = tuple(self._entries)
        self._encoded = _read_encoded(metadata["encoded"]) if "encoded" in metadata else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a field, decoded."""
        if name in self._encoded:
            return self._encoded[name].shape
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Native dtype of a field, decoded."""
        if name in self._encoded:
            return np.dtype(self._encoded[name].dtype)
        return self._raw_dtype(name)

    def array(self, name: str) -> np.ndarray:
        """A whole field in its native dtype. Raw fields are read-only views of the buffer."""
        if name in self._encoded:
            try:
                return decompress_all(self._encoded[name], self._bytes(name))
            except CodecError as error:
                raise CodecError(f"sample {self.key}, field {name}: {error}") from error
        return self._raw(name)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Entries ``indices`` (D,) of axis 0, (D, …), copied; nothing else of the field is decoded.

        Repeats and any order are allowed. IndexError if an index is negative or past the end.
        """
        indices = np.asarray(indices)
        num_rows = self.shape(name)[0]
        if len(indices) and not (indices.min() >= 0 and indices.max() < num_rows):
            raise IndexError(
                f"sample {self.key}: {name} has {num_rows} entries, asked for {indices.tolist()}"
            )
        if name not in self._encoded:
            return self._raw(name)[indices]
        try:
            return decompress_rows(self._encoded[name], self._bytes(name), indices)
        except CodecError as error:
            raise CodecError(f"sample {self.key}, field {name}: {error}") from error

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(
                f"sample {self.key} has no field {name!r}; it has: {', '.join(self.names)}"
            ) from None

    def _bytes(self, name: str) -> memoryview:
        entry = self._entry(name)
        return self._data[entry.begin : entry.end]

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


class _Entry(NamedTuple):
    """One tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(view: memoryview) -> tuple[dict, dict[str, _Entry], int]:
    """Metadata and tensors of a safetensors header, and where the data starts."""
    size = int.from_bytes(view[:8], "little") if len(view) >= 8 else -1
    if not 0 < size <= min(len(view) - 8, _MAX_HEADER_BYTES):
        raise CodecError(f"{len(view)} bytes that do not start with a safetensors header")
    try:
        header = json.loads(bytes(view[8 : 8 + size]))
        metadata = header.pop("__metadata__", {})
        entries = {
            name: _Entry(str(e["dtype"]), tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()
        }
        last = len(view) - 8 - size
        sound = isinstance(metadata, dict) and all(
            0 <= e.begin <= e.end <= last and all(type(n) is int for n in e.shape) for e in entries.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CodecError(f"the safetensors header cannot be read ({one_line(error)})") from error
    if not sound:
        raise CodecError("the safetensors header points past the end: the sample is damaged or cut short")
    return metadata, entries, 8 + size


def _read_encoded(text: str) -> dict[str, Encoded]:
    try:
        encoded = {
            name: Encoded(e["codec"], e["dtype"], tuple(e["shape"]), e["rows"], tuple(e["ends"]))
            for name, e in json.loads(text).items()
        }
        sound = all(e.is_sound() for e in encoded.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CodecError(f"the metadata entry 'encoded' cannot be read ({one_line(error)})") from error
    if not sound:
        raise CodecError("the metadata entry 'encoded' contradicts itself")
    return encoded
