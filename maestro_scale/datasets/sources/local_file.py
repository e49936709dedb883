"""Files on this machine, for libraries that read no others: a local file itself, or a copy of a remote one.

GDAL's drivers of vector files would open connections of their own, without the credentials, retries and time limits of
all other files.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
import weakref
from pathlib import Path
from urllib.parse import urlsplit

from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.spec import DatasetError

_BLOCK_BYTES = 16 * 2**20
_SIDECARS = {".shp": (".shx", ".dbf", ".prj", ".cpg")}
MAX_COPY_BYTES = 4 * 2**30
"""Of a remote file that is copied."""


class LocalFile:
    """A file at a path or address. ``address``: what messages call it; ``path``: where it is on this machine.

    A remote file is copied to a temporary folder, with the files that belong to it, and the copy is removed with this
    object. DatasetError if it is missing, cannot be read, or has more than ``most_bytes``.
    """

    def __init__(self, address: str, most_bytes: int = MAX_COPY_BYTES) -> None:
        self.address = address
        if not remote.is_remote(address):
            self.path = Path(remote.local_path(address))
            return
        folder = tempfile.mkdtemp(prefix="maestro-scale-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        suffix = posixpath.splitext(urlsplit(address).path)[1]
        self.path = Path(folder, f"copy{suffix}")
        _copy(address, self.path, most_bytes)
        for other in _SIDECARS.get(suffix.lower(), ()):
            try:
                _copy(f"{address.removesuffix(suffix)}{other}", self.path.with_suffix(other), most_bytes)
            except DatasetError as error:
                if error.kind != remote.MISSING:
                    raise


def _copy(address: str, path: Path, most_bytes: int) -> None:
    try:
        with remote.open_binary(address) as file, path.open("wb") as copy:
            size = file.seek(0, os.SEEK_END)
            if size > most_bytes:
                raise DatasetError(
                    f"{address}: is larger than {most_bytes / 2**20:.0f} MiB; copy it to this machine"
                )
            file.seek(0)
            shutil.copyfileobj(file, copy, _BLOCK_BYTES)
    except OSError as error:
        raise DatasetError(f"{address}: cannot be copied to {path.parent} ({error})") from error
