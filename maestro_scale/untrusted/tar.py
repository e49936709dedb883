"""Bounded listing of tar files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from maestro_scale.errors import shorten
from maestro_scale.untrusted.limits import PAX_RECORDS, TAR_MEMBERS, TAR_NAME_BYTES, InputError

_BLOCK = 512


class TarMember(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of the payload
    size: int


def list_tar(path: Path, strict: bool = False) -> list[TarMember]:
    """The regular files of an uncompressed tar (ustar, GNU or PAX), from its headers.

    Directories and what follows the end of the archive are skipped; ``strict``: refused too. InputError for links,
    devices, sparse files, names that are too long or contain NUL, sizes that are negative or exceed the file, more than
    ``TAR_MEMBERS`` members, damaged headers; OSError.

    Not the standard library's tarfile: it recurses for each long name, seeks by sizes that it did not check, and
    interprets sparse maps.
    """
    with path.open("rb") as file:
        return list_tar_file(file, strict)


def list_tar_file(file: IO[bytes], strict: bool = False) -> list[TarMember]:
    """As :func:`list_tar`, of an open file, of which only the headers are read."""
    members: list[TarMember] = []
    total = file.seek(0, 2)
    for member in _tar_members(file, total, strict):
        members.append(member)
        if len(members) > TAR_MEMBERS:
            raise InputError(f"has more than {TAR_MEMBERS} members")
    return members


def _tar_members(file: Any, total: int, strict: bool) -> Iterator[TarMember]:
    position = headers = num_records = 0
    name: str | None = None  # of the next member, from an extended header
    size: int | None = None
    while position < total or not position:
        block = _read(file, position, _BLOCK, total)
        if not any(block):
            if name is not None:
                raise InputError("ends after an extended header")
            if strict:
                _check_rest(file, position)
            return  # the end is marked by zeros; what follows is not read
        headers += 1
        if headers > 3 * TAR_MEMBERS:
            raise InputError(f"has more than {TAR_MEMBERS} members")
        _check_block(block, position)
        kind = block[156:157]
        if kind not in _PARSED:
            raise InputError(
                f"member {shorten(_text(block[:100]))} is {_KINDS.get(kind, 'of an unknown type')}"
            )
        length = _number(block[124:136])
        if kind in b"xLg":
            if length > 16 * TAR_NAME_BYTES:
                raise InputError(f"has an extended header of {length} bytes")
            content = _read(file, position + _BLOCK, length, total)
            if kind == b"L":
                name = _text(content)
            else:
                records, count = _pax_records(content)
                num_records += count
                if num_records > PAX_RECORDS:
                    raise InputError(f"has more than {PAX_RECORDS} records in PAX headers")
                if kind == b"x":
                    name = records.get("path", name)
                    size = _pax_size(records["size"]) if "size" in records else size
        else:
            length = length if size is None else size
            own = _text(block[:100])
            if block[257:263] == b"ustar\0" and block[345]:
                own = f"{_text(block[345:500])}/{own}"
            name = own if name is None else name
            if len(name) > TAR_NAME_BYTES or not name or "\0" in name:
                raise InputError(f"member {shorten(name)} has an empty or too long name, or one with a NUL")
            if position + _BLOCK + length > total:
                raise InputError("the last member is cut short")
            is_file = kind in (b"0", b"\0", b"7") and not name.endswith("/")
            if is_file:
                yield TarMember(name, position + _BLOCK, length)
            elif strict:
                raise InputError(f"member {shorten(name)} is a directory")
            elif length and kind == b"5":
                length = 0  # a directory has no payload, whatever its size says
            name = size = None
        position += _BLOCK + -(-length // _BLOCK) * _BLOCK
    if name is not None:
        raise InputError("ends after an extended header")


_PARSED = (b"0", b"\0", b"7", b"5", b"x", b"L", b"g")
_KINDS = {
    b"1": "a link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"K": "a link with a long name",
}


def _read(file: Any, position: int, length: int, total: int) -> bytes:
    if position + length > total:
        raise InputError("unexpected end of data")
    file.seek(position)
    return file.read(length)


def _check_rest(file: Any, position: int) -> None:
    """InputError unless the file contains only zeros from ``position``, where the archive ends."""
    file.seek(position)
    while content := file.read(1024 * 1024):
        if any(content):
            raise InputError(f"contains data after the end of the archive at byte {position}")


def _check_block(block: bytes, position: int) -> None:
    stored = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stored != unsigned:
        # Old tools summed signed bytes.
        signed = unsigned - 256 * (sum(b > 127 for b in block) - sum(b > 127 for b in block[148:156]))
        if stored != signed:
            raise InputError(f"bad checksum in the header at byte {position}")


def _number(field: bytes) -> int:
    """A number of a tar header: octal digits, or GNU's base 256. InputError if it is negative or malformed."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not re.fullmatch(rb"[0-7]+", digits):
        raise InputError(f"invalid number {shorten(digits)} in a header")
    return int(digits or b"0", 8)


def _pax_size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise InputError(f"invalid size {shorten(text)} in a PAX header")
    return int(text)


def _text(field: bytes) -> str:
    text = field.split(b"\0", 1)[0]
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise InputError(f"member {shorten(text)} has a name that is not UTF-8") from None


def _pax_records(content: bytes) -> tuple[dict[str, str], int]:
    """Path and size among the records ``<length> <key>=<value>\\n`` of an extended header, and the number of all."""
    records: dict[str, str] = {}
    position = count = 0
    while position < len(content) and content[position]:
        match = re.compile(rb"(\d{1,6}) ([^=]+)=").match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise InputError("invalid PAX header")
        key = match[2].decode(errors="replace")
        if key.startswith("GNU.sparse"):
            raise InputError("contains a sparse file, which is not supported")
        if key in ("path", "size"):
            try:
                records[key] = content[match.end() : end - 1].decode()
            except UnicodeDecodeError:
                raise InputError("a name in a PAX header is not UTF-8") from None
        position = end
        count += 1
    return records, count
