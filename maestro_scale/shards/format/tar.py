"""Reproducible tar files: headers without user, host or time, and the offset of each payload.

Offsets let a sample be read with one pread or range request; reproducible bytes let a repeated write be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from pathlib import Path
from urllib.parse import quote, unquote

from maestro_scale import untrusted
from maestro_scale.shards.errors import ManifestError, WriteError, one_line

SUFFIX = ".safetensors"
_BLOCK = 512
_END = bytes(2 * _BLOCK)


def member_name(key: str) -> str:
    """File name of a sample in its tar: the percent-encoded key, including dots, and ``.safetensors``.

    Dots are encoded because stock WebDataset takes everything before the first dot as the key.
    """
    return quote(key, safe="").replace(".", "%2E") + SUFFIX


def member_key(name: str) -> str:
    """The inverse of :func:`member_name`; ManifestError if ``name`` does not have that form."""
    base = name.removesuffix(SUFFIX)
    if base == name or not base or "." in base:
        raise ManifestError(f"member {name!r} is not named <key>{SUFFIX}, with dots in the key as %2E")
    return unquote(base)


class TarWriter:
    """Writes a tar sequentially and computes its SHA-256 on the way. WriteError if a write fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        try:
            self._file = open(path, "wb")  # noqa: SIM115 # closed by finish or discard
        except OSError as error:
            raise WriteError(f"{path}: cannot be written ({error.strerror})") from error

    def add(self, key: str, payload: bytes) -> int:
        """Append a member; returns the offset of its payload."""
        info = tarfile.TarInfo(member_name(key))
        info.size = len(payload)
        header = info.tobuf(tarfile.GNU_FORMAT)  # mtime 0, uid 0, no names, mode 0644
        offset = self.bytes + len(header)
        self._write(header)
        self._write(payload)
        self._write(bytes(-len(payload) % _BLOCK))
        return offset

    def finish(self) -> str:
        """Write the end of the archive and close the file; returns its SHA-256."""
        self._write(_END)
        try:
            self._file.close()
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Delete and close the incomplete file."""
        self.path.unlink(missing_ok=True)
        # On a full disk closing fails again, and its error would hide the first one.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written ({error.strerror}); free some disk space"
            ) from error
        self._sha256.update(data)
        self.bytes += len(data)


def scan(path: Path) -> list[untrusted.TarMember]:
    """Name, payload offset and payload size of every file in a tar. ManifestError if it is not a complete tar."""
    try:
        return untrusted.list_tar(path)
    except (untrusted.InputError, OSError) as error:
        raise ManifestError(f"{path}: is not a complete tar ({one_line(error)})") from error
