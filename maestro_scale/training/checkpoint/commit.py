"""Atomic folders: a marker file, written last, lists every file with its size and sha256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError, shorten
from maestro_scale.interop.tensors import file_sha256
from maestro_scale.shards.local_storage import fsync

MARKER = "COMMIT.json"
FORMAT_VERSION = 2
"""The newest version that is read, of the marker and of what it commits. Markers of early revisions have none, which is
version 1. Version 2: checkpoints whose index has its slices in a file of its own."""

_OWN = "sha256"  # key of the marker's own hash, of all its other content


class NewerFormatError(MaestroError):
    """A folder was written by a later revision. Not a damage: the folder must stay as it is."""


def entry(path: Path) -> dict[str, Any]:
    """The entry of a finished file in a marker. The file is flushed to disk first."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def commit(
    folder: Path, content: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], version: int = 1
) -> None:
    """Write the marker of a folder: ``content``, and ``files`` as {path within the folder: ``entry``}.

    ``version``: the lowest one whose readers can read what it commits.
    """
    whole = {"format_version": version, **content, "files": dict(files)}
    marker = folder / MARKER
    marker.write_text(json.dumps({**whole, _OWN: _digest(whole)}, indent=1))
    fsync(marker)
    fsync(folder)


def content(text: str | bytes) -> dict[str, Any]:
    """The content of a marker. ValueError if its hash does not match; NewerFormatError."""
    try:
        # NaN: the state of the loss guard may have it
        whole = untrusted.load_json(text, allow_nan=True)
    except untrusted.InputError as error:
        raise ValueError(f"unreadable {MARKER} ({error})") from error
    if not isinstance(whole, dict) or not {_OWN, "files"} <= set(whole):
        raise ValueError(f"unreadable {MARKER} (it lists no files, or lacks its own hash)")
    own = whole.pop(_OWN)
    if own != _digest(whole):
        raise ValueError(f"{MARKER} has changed since it was written")
    version = whole.get("format_version", 1)
    if type(version) is not int:
        raise ValueError(f"unreadable {MARKER} (its format_version is {shorten(version)})")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{MARKER} has format version {version}, this maestro-scale reads up to {FORMAT_VERSION}: update it"
        )
    _check_files(whole["files"])
    return whole


def _check_files(files: Any) -> None:
    """ValueError unless ``files`` are entries of files below the folder; the marker may come from elsewhere."""
    if not isinstance(files, dict):
        raise ValueError(f"unreadable {MARKER} (its files are {shorten(files)})")
    for name, listed in files.items():
        if not untrusted.is_relative_path(name):
            raise ValueError(f"{MARKER} lists {shorten(name)}, which is not a path below its folder")
        fields = listed if isinstance(listed, dict) else {}
        if type(fields.get("bytes")) is not int or type(fields.get("sha256")) is not str:
            raise ValueError(f"{MARKER} has no size and sha256 of {shorten(name)}")


def read(folder: Path) -> dict[str, Any]:
    """As ``content``, of a folder. ValueError also if it has no marker."""
    try:
        return content(untrusted.read_bytes(folder / MARKER))
    except NewerFormatError as error:
        raise NewerFormatError(f"{folder}: {error}") from None
    except OSError as error:
        raise ValueError(f"unreadable {MARKER} ({error.strerror})") from error


def problem(folder: Path, hashes: bool = False) -> str | None:
    """What is wrong with a committed folder, or None. Sizes are always checked; contents only with ``hashes``."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return str(error)
    return damage(folder, dict(sorted(files.items())), hashes)


def damage(folder: Path, files: Mapping[str, Mapping[str, Any]], hashes: bool) -> str | None:
    """The first of ``files``, entries of a marker, that is not what it was, and why; None if all are. One call of stat
    for each file."""
    for name, expected in files.items():
        file = folder / name
        try:
            status = file.stat()
        except OSError:
            return f"{name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is missing"
        if status.st_size != expected["bytes"]:
            return f"{name} has {status.st_size} bytes instead of {expected['bytes']}"
        if hashes and file_sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written (sha256)"
    return None


def publish(staging: Path, final: Path, aside: Path) -> None:
    """Rename a committed folder to ``final``, atomically. A folder of that name is moved to ``aside`` first."""
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)  # left by a kill after such a publication
        os.replace(final, aside)
    os.replace(staging, final)
    fsync(final.parent)


def _digest(whole: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
