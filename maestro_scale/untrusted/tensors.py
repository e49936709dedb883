"""Bounded parsing of safetensors headers and decompression of zstd frames."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maestro_scale.errors import shorten
from maestro_scale.untrusted.documents import check_regular, load_json
from maestro_scale.untrusted.limits import FRAME_BYTES, HEADER, TENSOR_AXES, InputError, at, size_text

if TYPE_CHECKING:
    from torch import Tensor


class TensorEntry(NamedTuple):
    """Header entry of one tensor: bytes [begin, end) of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


_ITEM_BYTES = {
    code: size
    for size, codes in (
        (1, ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2")),
        (2, ("U16", "I16", "F16", "BF16")),
        (4, ("U32", "I32", "F32")),
        (8, ("U64", "I64", "F64")),
    )
    for code in codes
}


def parse_safetensors_header(text: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Metadata and tensor entries of a safetensors header; ``data_bytes``: length of what follows it.

    InputError unless every entry has valid types, its bytes match shape and dtype, and the tensors cover the data
    without overlaps or gaps, as the format requires.
    """
    header = load_json(text, limits=HEADER)
    if not isinstance(header, dict):
        raise InputError("is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise InputError("__metadata__ is not an object of texts")
    entries = {name: _tensor_entry(name, fields) for name, fields in header.items()}
    reached, previous = 0, ""
    for begin, end, name in sorted((e.begin, e.end, name) for name, e in entries.items()):
        if begin != reached:
            what = (
                f"overlaps {shorten(previous)}"
                if begin < reached
                else f"starts at byte {begin}, not {reached}"
            )
            raise InputError(f"tensor {shorten(name)} {what}")
        reached, previous = end, name
    if reached != data_bytes:
        what = (
            "points past the end" if reached > data_bytes else f"leaves {data_bytes - reached} bytes unused"
        )
        raise InputError(f"{what}: damaged or cut short")
    return metadata, entries


_TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_METADATA = re.compile(rb'\{"__metadata__":(\{(?:%b:%b,?)*\}),(?=")' % (_TEXT, _TEXT))


def split_safetensors_header(text: bytes) -> tuple[dict[str, str], bytes]:
    """The metadata of a header, and the header without them, for :func:`parse_safetensors_header`. InputError.

    Only where they are its first entry and all of them are texts; otherwise the header as it is, and no metadata. The
    rest, without padding, is the same in all files with the same tensors, so it needs to be parsed once.
    """
    found = _METADATA.match(text)
    if found is None:
        return {}, text
    # Whether keys and texts are valid is left to the parser, which refuses what the expression is too simple for.
    return load_json(found[1], limits=HEADER), b"{" + text[found.end() :].rstrip(b" ")


_FIELDS = {"dtype", "shape", "data_offsets"}


def _tensor_entry(name: str, fields: Any) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise InputError(f"tensor {shorten(name)} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if type(dtype) is not str or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"tensor {shorten(name)} has a dtype, shape or data_offsets of the wrong type")
    if len(shape) > TENSOR_AXES:
        raise InputError(f"tensor {shorten(name)} has {len(shape)} axes, more than {TENSOR_AXES}")
    begin, end = offsets
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise InputError(f"tensor {shorten(name)} has {end - begin} bytes for {dtype} {tuple(shape)}")
    if end < begin:
        raise InputError(f"tensor {shorten(name)} ends before it starts")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and (not values or (set(map(type, values)) == {int} and min(values) >= 0))


def decompress_frame(frame: bytes | memoryview, size: int, decompressor: Any) -> bytes:
    """Content of one zstd frame that must have ``size`` bytes; InputError otherwise. ``decompressor``: of zstandard."""
    import zstandard

    if size > FRAME_BYTES:
        raise InputError(f"has {size} bytes decompressed, more than {size_text(FRAME_BYTES)}")
    try:
        # Checked before decompression: the header of a damaged frame could ask for any amount of memory.
        if zstandard.frame_content_size(frame) != size:
            raise InputError(f"does not hold the {size} bytes its shape needs")
        return decompressor.decompress(frame, max_output_size=size)
    except zstandard.ZstdError as error:
        raise InputError(f"cannot be decompressed ({error})") from None


def load_tensors(source: Path | bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file (memory-mapped) or of its bytes, on the CPU. InputError; OSError.

    The library checks the header itself: its size, types, offsets and overlaps.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    if isinstance(source, Path):
        check_regular(source)
    try:
        return load_file(source) if isinstance(source, Path) else load(source)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(_tensor_problem(error)) from None


def open_tensors(path: Path) -> Any:
    """A context manager that reads slices of the tensors of a safetensors file. InputError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(at(str(path), _tensor_problem(error))) from None


def _tensor_problem(error: Exception) -> str:
    return f"is not a valid safetensors file ({' '.join(str(error).split()) or type(error).__name__})"
