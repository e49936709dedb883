"""A bounded, deterministic list of the files below a folder or an address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.datasets.sources import remote
from maestro_scale.datasets.sources.listing import is_text
from maestro_scale.datasets.sources.local_file import LocalFile
from maestro_scale.datasets.spec import DatasetError

MAX_FILES = 20_000
"""Files that are looked at. Names repeat: more would say the same."""
_MAX_FOLDERS = 2_000
_PER_FOLDER = 2_000
_MAX_COPY_BYTES = 256 * 2**20
_SIDECARS = (".aux.xml", ".ovr", ".msk", ".tfw", ".md5", ".sha256")
_ZARR = (".zgroup", ".zarray", ".zmetadata", "zarr.json")


@dataclass(frozen=True)
class Listing:
    """Paths relative to ``src`` (a folder or an address), sorted; ``complete`` is False where there are more."""

    src: str
    paths: tuple[str, ...]
    num_seen: int
    complete: bool


_ONE_SLASH = re.compile(r"(?<=^s3):/(?!/)|(?<=^gs):/(?!/)")  # as a path library joins an address


def list_source(src: str) -> Listing:
    """The files of a folder, of an address such as ``s3://bucket/data``, or a single file or Zarr as one.

    At most :data:`MAX_FILES`, spread over the folders. Hidden files, sidecar files of GDAL, links out of a cycle and
    names that are not UTF-8 are left out. A Zarr is one path. DatasetError (one line) if there is no such folder or
    file.
    """
    src = src.rstrip("/") or "/"
    folder, _, name = src.rpartition("/")
    if remote.is_remote(src):
        # An address does not say what it is: its name does.
        if "." in name and (not name.endswith(".zarr")):
            return Listing(folder, (name,), 1, True)
    elif Path(src).is_file():
        return Listing(str(Path(src).parent), (Path(src).name,), 1, True)
    elif not Path(src).is_dir():
        raise DatasetError(
            f"{src}: is neither a folder nor a file; check the path"
            f"{f', or write {address}' if (address := _ONE_SLASH.sub('://', src)) != src else ''}"
        )
    listing = _list(src)
    if listing.paths == ("",):  # the folder is a Zarr itself
        return Listing(folder or ".", (name,), 1, True)
    return listing


def _list(src: str) -> Listing:
    entries = remote.scan(src)
    folders: list[str] = [""]
    found: list[str] = []
    num_seen, complete, visited = 0, True, 0
    while folders:
        below: list[str] = []
        for folder in folders:
            if visited == _MAX_FOLDERS:
                complete = False
                break
            visited += 1
            names = sorted(entries(folder))
            if any(name in _ZARR for name, is_folder in names if not is_folder):
                found.append(folder.rstrip("/"))
                num_seen += 1
                continue
            files = [n for n, is_folder in names if not is_folder and not _is_hidden(n)]
            num_seen += len(files)
            if len(files) > _PER_FOLDER:
                complete = False
                files = _spread(files, _PER_FOLDER)
            found += [f"{folder}{name}" for name in files]
            local = not remote.is_remote(src)
            below += [
                f"{folder}{name}/"
                for name, is_folder in names
                if is_folder
                and not _is_hidden(name)
                and not (local and (Path(src) / folder / name).is_symlink())
            ]
        folders = below
    if len(found) > MAX_FILES:
        complete = False
        found = _spread(found, MAX_FILES)
    return Listing(src, tuple(sorted(found)), num_seen, complete)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower().endswith(_SIDECARS) or not is_text(name)


def _spread(items: list[str], most: int) -> list[str]:
    step = len(items) / most
    return [items[int(i * step)] for i in range(most)]


def local_copy(src: str, path: str) -> LocalFile:
    """A file on this machine: itself, or a copy of a remote one, of at most 256 MiB. DatasetError."""
    return LocalFile(remote.join(src, path), _MAX_COPY_BYTES)
