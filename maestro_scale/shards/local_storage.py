"""Storage in a local or shared folder, and the types that all storage backends share."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.remote.errors import check_limit
from maestro_scale.shards.errors import ConditionFailed, StoreError, WriteError


@dataclass(frozen=True)
class Snapshot:
    """Content of a small file, with what a conditional write or a lease needs to know about it.

    tag: identifies the content (ETag); None if the storage has none.
    age_s: time since it was written, by the storage's own clock; None if the storage does not say.
    """

    data: bytes
    tag: str | None = None
    age_s: float | None = None


class LocalStorage:
    """A local or shared folder."""

    conditional = False  # a file can be created exclusively, but not replaced on a condition

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, name: str = "") -> str:
        """The full path of a file, for messages."""
        return str(self.folder / name)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Content of a small file. FileNotFoundError if it is missing, StoreError if it cannot be read.

        ``limit``: most bytes; StoreError for a larger file, or one that is not a regular file.
        """
        path = self.folder / name
        try:
            if limit is None:
                return path.read_bytes()
            # Before it is opened: a named pipe would block, a device would never end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise StoreError(f"{self.address(name)}: is not a regular file")
            with path.open("rb") as file:
                return check_limit(file.read(limit + 1), limit, self.address(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(self.address(name)) from error
        except OSError as error:
            raise StoreError(f"{self.address(name)}: cannot be read ({error.strerror})") from error

    def size(self, name: str) -> int | None:
        """Size in bytes; None if there is no such file."""
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self.address(name)}: cannot be read ({error.strerror})") from error

    def list_names(self) -> list[str]:
        """Sorted names of the files and folders directly inside; empty if the folder is missing."""
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.address()}: cannot be listed ({error.strerror})") from error

    def publish(self, source: Path, name: str) -> None:
        """Move a complete file of the same file system to ``name``, atomically and durably."""
        try:
            # In this order: the data first, or a power cut after the rename could leave the final name on an empty
            # file; then the rename, which is atomic; then the folder, whose entry is only durable after its own fsync.
            fsync(source)
            os.replace(source, self.folder / name)
            fsync(self.folder)
        except OSError as error:
            raise WriteError(f"{self.address(name)}: cannot be written ({error.strerror})") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(data)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(f"{self.address(name)}: cannot be written ({error.strerror})") from error
        self.publish(temporary, name)

    def read_snapshot(self, name: str) -> Snapshot:
        """Content of a small file and its age. Raises as :meth:`read`."""
        data = self.read(name)
        probe = self.folder / f".{name}.{secrets.token_hex(4)}.now"
        try:
            # Both times are of the file server's clock, which may differ from that of this machine.
            probe.touch()
            age_s = probe.stat().st_mtime - (self.folder / name).stat().st_mtime
        except FileNotFoundError as error:
            raise FileNotFoundError(self.address(name)) from error
        except OSError:
            return Snapshot(data)
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        return Snapshot(data, None, age_s)

    def write_snapshot(self, name: str, data: bytes, previous: Snapshot | None) -> str | None:
        """Write a small file. ConditionFailed if it exists although ``previous`` is None."""
        if previous is not None:
            self.write(name, data)
            return None
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_bytes(data)
            os.link(temporary, self.folder / name)  # atomic, and fails if the name exists, also on NFS
        except FileExistsError as error:
            raise ConditionFailed(self.address(name)) from error
        except OSError as error:
            raise WriteError(f"{self.address(name)}: cannot be written ({error.strerror})") from error
        finally:
            temporary.unlink(missing_ok=True)
        return None

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.folder / name).unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
