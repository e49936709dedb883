"""Folders that are whole or not there: a marker, written last, lists every file with its size and sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maestro_scale.shards.storage import fsync

MARKER = "COMMIT.json"

_OWN = "sha256"  # of the rest of the marker


def entry(path: Path) -> dict[str, Any]:
    """A finished file as a marker lists it; its content is on the disk when this returns."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def commit(folder: Path, content: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the marker of a folder: ``content`` beside ``files``, {path within the folder: ``entry``}."""
    whole = {**content, "files": dict(files)}
    marker = folder / MARKER
    marker.write_text(json.dumps({**whole, _OWN: _digest(whole)}, indent=1))
    fsync(marker)
    fsync(folder)


def content(text: str | bytes) -> dict[str, Any]:
    """What a marker holds. ValueError where it is not what was written."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise ValueError(f"unreadable {MARKER} ({error})") from error
    if not isinstance(whole, dict) or not {_OWN, "files"} <= set(whole):
        raise ValueError(f"unreadable {MARKER} (it lists no files, or lacks its own hash)")
    own = whole.pop(_OWN)
    if own != _digest(whole):
        raise ValueError(f"{MARKER} has changed since it was written")
    return whole


def read(folder: Path) -> dict[str, Any]:
    """As ``content``, of a folder. ValueError also where it has none."""
    try:
        return content((folder / MARKER).read_bytes())
    except OSError as error:
        raise ValueError(f"unreadable {MARKER} ({error.strerror})") from error


def problem(folder: Path, hashes: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a committed folder, in words, or None. Sizes always; contents only with ``hashes``, those of
    every n-th file from the i-th on where ``share`` is (i, n)."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return str(error)
    first, every = share
    for number, (name, expected) in enumerate(sorted(files.items())):
        file = folder / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if hashes and number % every == first and _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written (sha256)"
    return None


def publish(staging: Path, final: Path, aside: Path) -> None:
    """Give a committed folder its name in one go. What has that name goes to ``aside``: a kill loses neither."""
    if final.exists():
        os.replace(final, aside)
    os.replace(staging, final)
    fsync(final.parent)


def _digest(whole: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
