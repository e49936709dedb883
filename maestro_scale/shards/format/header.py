"""Header of a stored sample: its key, and where its fields are (the format: :mod:`.codec`).

Samples of a shard differ in key and place, but most have as many dates of everything as others, so the rest of their
headers is the same text. It is parsed and checked once, and the samples share one :class:`Layout`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from maestro_scale import untrusted
from maestro_scale.errors import shorten
from maestro_scale.shards.errors import CodecError
from maestro_scale.shards.format.compress import FieldEncoding

TO_SAFETENSORS = {
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
FROM_SAFETENSORS = {code: np.dtype(name) for name, code in TO_SAFETENSORS.items()}
_HEADER_BYTES = 16 * 1024  # read by the first call; few headers are longer
_LAYOUTS = 1024  # remembered; each takes about 10 kB


class ByteReader(Protocol):
    """Random access to bytes that are not in memory, such as a part of a file."""

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end)."""
        ...


class StoredField(NamedTuple):
    """One field: ``dtype`` (None: one that numpy lacks, called ``code``) and shape when decoded; bytes [begin, end) of
    the data."""

    dtype: np.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int
    code: str
    encoding: FieldEncoding | None = None


class Layout:
    """The fields of a sample by name. Samples that share one need to be checked against a spec only once, so it is
    compared and hashed by identity."""

    def __init__(self, fields: Mapping[str, StoredField]) -> None:
        self.fields = fields
        self.names = tuple(fields)


class Header(NamedTuple):
    """``start``: of the data, from the start of the sample. ``place``: as of ``Sample``."""

    key: str
    place: str | None
    layout: Layout
    start: int


def read_header(reader: ByteReader) -> Header:
    """The header of a sample, all bounds checked. CodecError if it is not one."""
    length = len(reader)
    first = reader.read(0, min(length, _HEADER_BYTES))
    size = int.from_bytes(first[:8], "little") if length >= 8 else -1
    if not 0 < size <= min(length - 8, untrusted.HEADER.bytes):
        raise CodecError(f"{length} bytes that do not start with a safetensors header")
    text = first[8 : 8 + size] if 8 + size <= len(first) else reader.read(8, 8 + size)
    try:
        metadata, layout = _parse(bytes(text), length - 8 - size)
    except untrusted.InputError as error:
        raise CodecError(f"the safetensors header is not valid: {error}") from None
    if not isinstance(metadata.get("key"), str):
        raise CodecError("the safetensors metadata has no 'key'; save with metadata={'key': …}")
    if "encoded" in metadata:
        layout = _encoded(metadata["encoded"], layout)
    return Header(metadata["key"], metadata.get("place"), layout, 8 + size)


def _parse(text: bytes, data_bytes: int) -> tuple[Mapping[str, str], Layout]:
    metadata, rest = untrusted.split_safetensors_header(text)
    # Ends of compressed frames differ from sample to sample: these would only displace others.
    parse = _parse_fields if "encoded" in metadata else _parse_fields_once
    more, layout = parse(rest, data_bytes)
    if metadata and more:
        raise untrusted.InputError("contains the key '__metadata__' twice")
    return metadata or more, layout


def _parse_fields(text: bytes, data_bytes: int) -> tuple[Mapping[str, str], Layout]:
    metadata, entries = untrusted.parse_safetensors_header(text, data_bytes)
    fields = {
        name: StoredField(FROM_SAFETENSORS.get(e.dtype), e.shape, e.begin, e.end, e.dtype)
        for name, e in entries.items()
    }
    return metadata, Layout(fields)


_parse_fields_once = functools.lru_cache(_LAYOUTS)(_parse_fields)


def _encoded(text: str, layout: Layout) -> Layout:
    """The layout with the compressed fields that the metadata describe."""
    try:
        values = untrusted.load_json(text, limits=untrusted.HEADER)
        if not isinstance(values, dict):
            raise untrusted.InputError("is not an object")
        encodings = {name: untrusted.from_builtins(FieldEncoding, e) for name, e in values.items()}
    except untrusted.InputError as error:
        raise CodecError(f"the metadata entry 'encoded' cannot be read ({error})") from None
    fields = dict(layout.fields)
    for name, encoding in encodings.items():
        stored = fields.get(name)
        if stored is None or stored.code != "U8" or len(stored.shape) != 1:
            raise CodecError(
                f"the metadata entry 'encoded' has {shorten(name)}, which is not a tensor of bytes"
            )
        problem = encoding.problem()
        if problem is None and encoding.ends[-1] != stored.shape[0]:
            problem = f"its frames end at byte {encoding.ends[-1]} of {stored.shape[0]}"
        if problem is not None:
            raise CodecError(f"the metadata entry 'encoded' is inconsistent: {shorten(name)}: {problem}")
        fields[name] = stored._replace(
            dtype=np.dtype(encoding.dtype), shape=encoding.shape, encoding=encoding
        )
    return Layout(fields)
