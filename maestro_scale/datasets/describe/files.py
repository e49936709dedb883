"""A bounded, deterministic list of the files in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.datasets.spec import DatasetError

MAX_FILES = 20_000
"""Files that are looked at. Names repeat: more would say the same."""
_MAX_FOLDERS = 2_000
_PER_FOLDER = 2_000
_SIDECARS = (".aux.xml", ".ovr", ".msk", ".tfw", ".md5", ".sha256")


@dataclass(frozen=True)
class Listing:
    """Paths relative to a folder, sorted, with ``/``; ``complete`` is False where there are more."""

    root: Path
    paths: tuple[str, ...]
    num_seen: int
    complete: bool


def list_files(root: Path) -> Listing:
    """The files below ``root``, folder by folder, at most :data:`MAX_FILES` spread over the folders.

    Hidden files, sidecar files of GDAL and links out of a cycle are left out. A Zarr store is one path.
    """
    folders, found = [""], []
    num_seen, complete, visited = 0, True, 0
    while folders:
        below: list[str] = []
        for folder in folders:
            if visited == _MAX_FOLDERS:
                complete = False
                break
            visited += 1
            names, subfolders = _entries(root / folder)
            num_seen += len(names)
            if len(names) > _PER_FOLDER:
                complete = False
                step = len(names) / _PER_FOLDER
                names = [names[int(i * step)] for i in range(_PER_FOLDER)]
            found += [f"{folder}{name}" for name in names]
            below += [f"{folder}{name}/" for name in subfolders]
        folders = below
    if len(found) > MAX_FILES:
        complete = False
        step = len(found) / MAX_FILES
        found = [found[int(i * step)] for i in range(MAX_FILES)]
    return Listing(root, tuple(sorted(found)), num_seen, complete)


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower().endswith(_SIDECARS):
                    continue
                if not entry.is_dir() or is_zarr(Path(entry.path)):
                    files.append(entry.name)
                elif not entry.is_symlink():
                    folders.append(entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot list the folder ({error.strerror}); check the path") from error
    return sorted(files), sorted(folders)


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr store (versions 2 and 3)."""
    return any((path / name).is_file() for name in (".zgroup", ".zarray", ".zmetadata", "zarr.json"))
