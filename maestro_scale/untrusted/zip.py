"""Opening of zip archives with a bounded directory."""

from __future__ import annotations

import zipfile
from typing import Any, BinaryIO

from maestro_scale.untrusted.limits import ZIP_DIRECTORY_BYTES, InputError, size_text

_ENTRY = b"PK\x01\x02"  # the begin of each entry of the directory


def open_zip(file: BinaryIO, max_members: int) -> zipfile.ZipFile:
    """The archive in an open file, which stays open. InputError if its directory has more than ``max_members`` entries
    or 64 MiB; the errors of ``zipfile`` if it is damaged."""
    bounded = _DirectoryFile(file, max_members)
    archive = zipfile.ZipFile(bounded)
    bounded.reads_directory = False
    return archive


class _DirectoryFile:
    """A file whose reads are checked while ZipFile reads the directory, which takes 15 us and 500 bytes for an entry.

    What ZipFile reads is checked, and not the counts in the file: it does not use them.
    """

    def __init__(self, file: BinaryIO, max_members: int) -> None:
        self._file, self._max_members = file, max_members
        self.reads_directory = True

    def read(self, size: int = -1) -> bytes:
        if not self.reads_directory:
            return self._file.read(size)
        if size > ZIP_DIRECTORY_BYTES:
            raise InputError(f"has a directory of more than {size_text(ZIP_DIRECTORY_BYTES)}")
        data = self._file.read(size)
        if data.count(_ENTRY) > self._max_members:
            raise InputError(f"has more than {self._max_members} records")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
