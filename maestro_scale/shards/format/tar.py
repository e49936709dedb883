"""Tar files as bytes: members whose headers name no user, host or time, and where each payload lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from pathlib import Path
from urllib.parse import quote, unquote

from maestro_scale.shards.errors import ManifestError, WriteError

SUFFIX = ".safetensors"
_BLOCK = 512
_END = bytes(2 * _BLOCK)


def member_name(key: str) -> str:
    """File name of a sample in its tar: percent-encoded, dots too: stock WebDataset groups by the first dot."""
    return quote(key, safe="").replace(".", "%2E") + SUFFIX


def member_key(name: str) -> str:
    """The key that :func:`member_name` made ``name`` from; ManifestError if it is no such name."""
    base = name.removesuffix(SUFFIX)
    if base == name or not base or "." in base:
        raise ManifestError(f"member {name!r} is not named <key>{SUFFIX}, with dots in the key as %2E")
    return unquote(base)


class TarWriter:
    """Writes a tar at ``path`` from its start, hashing as it goes. WriteError if the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        try:
            self._file = open(path, "wb")  # noqa: SIM115 # closed by finish or discard
        except OSError as error:
            raise WriteError(f"{path}: cannot be written ({error.strerror})") from error

    def add(self, key: str, payload: bytes) -> int:
        """Append a member; where its payload starts."""
        info = tarfile.TarInfo(member_name(key))
        info.size = len(payload)
        header = info.tobuf(tarfile.GNU_FORMAT)  # mtime 0, uid 0, no names, mode 0644
        offset = self.bytes + len(header)
        self._write(header)
        self._write(payload)
        self._write(bytes(-len(payload) % _BLOCK))
        return offset

    def finish(self) -> str:
        """End and close the file; its SHA-256."""
        self._write(_END)
        try:
            self._file.close()
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Delete and close the file."""
        self.path.unlink(missing_ok=True)
        # On a full disk closing fails as writing did, and would hide why.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror}); free some space") from error
        self._sha256.update(data)
        self.bytes += len(data)


def scan(path: Path) -> list[tuple[str, int, int]]:
    """Name, payload offset and payload size of every file in a tar. ManifestError if it is no whole tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise ManifestError(f"{path}: is no whole tar ({' '.join(str(error).split())})") from error
    if members and members[-1][1] + members[-1][2] > os.path.getsize(path):
        raise ManifestError(f"{path}: is no whole tar (the last member is cut)")
    return members
