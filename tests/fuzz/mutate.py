"""Mutations that keep the structure of a document: JSON values, safetensors headers and tar headers.

Random bytes rarely survive the first check of a format. These mutate one value of a document that parses, and repair
lengths and checksums. :func:`mutate` chooses between them and changes of bytes.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**38,
    0.5,
    1e308,
    -0.0,
    "",
    "a",
    "../x",
    "/etc/passwd",
    "a\0b",
    "$\\frac{a}$",
    "<script>alert(1)</script>",
    "\x1b[31m",
    "ü" * 50,
    "x" * 5000,
    "int16",
    [],
    [[]],
    [0] * 100,
    {},
    {"": {}},
]
TEXTS = [b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b'"\\ud800"', b"[" * 1500, b'{"a":' * 1500]


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A variation of ``data``; ``other``: a document to take parts from."""
    choice = rng.random()
    if choice < 0.6:
        for change in rng.sample([json_value, safetensors_header, tar_header, prefixed_json], 4):
            changed = change(data, rng)
            if changed is not None:
                return changed
    return change_bytes(data, rng, other)


def change_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        position = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[position % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[position:position] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 2:
            del out[position : position + rng.choice((1, 4, 64, 512))]
        elif kind == 3:
            out[position:position] = out[position : position + rng.choice((1, 16, 512))] * rng.choice(
                (1, 4, 64)
            )
        elif kind == 4:
            out[position : position + rng.choice((0, 1, 8))] = rng.choice(TEXTS)
        elif other:
            start = rng.randrange(len(other))
            out[position:position] = other[start : start + rng.choice((4, 64, 512))]
    return bytes(out)


def json_value(data: bytes, rng: random.Random) -> bytes | None:
    """With one value of a JSON document replaced, repeated or removed; None if it is not JSON."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places(document))
    if not places:
        return None
    container, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("x", "shape", "", str(key) + "s", "a\0", "../a"))] = container[key]
    elif kind == 2:
        container[key] = [container[key]] * rng.choice((1, 2, 3))
    elif kind == 3 and isinstance(container[key], (int, float)):
        container[key] += rng.choice((-1, 1, 0.5, 2**32, -container[key]))
    else:
        container[key] = rng.choice(VALUES)
    text = json.dumps(document).encode()
    if rng.random() < 0.1:
        text = text.replace(b'"x"', rng.choice(TEXTS))
    return text


def _places(node: Any) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key
            yield from _places(value)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield node, number
            yield from _places(value)


def safetensors_header(data: bytes, rng: random.Random) -> bytes | None:
    """With one value of the header replaced, also in the JSON within its metadata, and its length repaired."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < size <= len(data) - 8:
        return None
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        texts = [key for key, text in metadata.items() if text.startswith("{")]
    except (ValueError, AttributeError, RecursionError):
        return None
    if texts and rng.random() < 0.5:
        key = rng.choice(texts)
        changed = json_value(metadata[key].encode(errors="replace"), rng)
        if changed is None:
            return None
        metadata[key] = changed.decode(errors="replace")
        text = json.dumps(header).encode()
    else:
        text = json_value(data[8 : 8 + size], rng) or b"{}"
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def tar_header(data: bytes, rng: random.Random) -> bytes | None:
    """With one field of a tar header changed and its checksum repaired, or a member repeated."""
    starts = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not starts:
        return None
    out = bytearray(data)
    start = rng.choice(starts)
    if rng.random() < 0.2:
        out[start:start] = data[start : start + 512 * rng.choice((1, 2, 8))] * rng.choice((1, 2, 50))
        return bytes(out)
    begin, length, values = rng.choice(FIELDS)
    value = rng.choice(values)[:length]
    out[start + begin : start + begin + length] = value.ljust(length, b"\0")
    out[start + 148 : start + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(out[start : start + 512]))[0]
    return bytes(out)


FIELDS: list[tuple[int, int, list[bytes]]] = [
    (
        0,
        100,
        [b"", b"/abs.safetensors", b"../x.safetensors", b"a%00.safetensors", b"\xff.safetensors", b"a" * 100],
    ),
    (
        124,
        12,
        [
            b"0",
            b"77777777777",
            b"-1",
            b"\xff" * 12,
            b"\x80" + b"\xff" * 11,
            b"\x80" + bytes(9) + b"\xff\0",
            b"9",
        ],
    ),
    (156, 1, [bytes([b]) for b in b"0123456LKxgSVAN\0"]),
    (257, 8, [b"ustar\x0000", b"ustar  \0", b"", b"other"]),
    (345, 155, [b"", b"prefix", b"../..", b"\xff"]),
]


def prefixed_json(data: bytes, rng: random.Random) -> bytes | None:
    """JSON after a byte, or after four bytes with its length (the formats of the targets run and model)."""
    size = int.from_bytes(data[:4], "little")
    if 0 < size <= len(data) - 4 and (changed := json_value(data[4 : 4 + size], rng)) is not None:
        return len(changed).to_bytes(4, "little") + changed + data[4 + size :]
    if data and (changed := json_value(data[1:], rng)) is not None:
        return data[:1] + changed
    return None


Mutator = Callable[[bytes, random.Random, bytes], bytes]
