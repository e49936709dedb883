"""Digest of what a baseline is made of beside its name: the code of the user's class, and local files of weights.

Files can be replaced under the same name, so the name of a baseline alone does not say which encoder it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from maestro_scale.evaluation.baselines.protocol import parse_options

_PYTHON = "python"
_CHUNK = 1 << 20


def content_digest(encoder: str) -> str:
    """SHA-256 of the local files that ``NAME[:ARGUMENT[,option=value,…]]`` refers to, those of folders included; empty
    where there are none.

    Of ``python:pkg.module:Class`` also the file of the module, but not what it imports. OSError where a file cannot be
    read; nothing is raised for a module that cannot be found or imported.
    """
    head, _, argument = encoder.partition(":")
    value, options = parse_options(argument)
    found: list[Path] = []
    if head == _PYTHON and (code := _module_file(value)) is not None:
        found.append(code)
    for name in filter(None, (value, value.rpartition("@")[2] if "@" in value else "", *options.values())):
        found += files_below(Path(name))
    return files_digest(found)


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, in this order; empty without any."""
    lines = "".join(f"{path.name}\0{_sha256(path, *_stamp(path))}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest() if lines else ""


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files of a folder; none where there is nothing."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()


def _module_file(value: str) -> Path | None:
    """The source of ``pkg.module:Class``; None where it is not found, or where its package, which is imported to find
    it, raises an error. Building the baseline reports either."""
    try:
        spec = importlib.util.find_spec(value.partition(":")[0])
    except Exception:  # noqa: BLE001 - of the user's package
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache
def _sha256(path: Path, *stamp: int) -> str:
    """Of a file; ``stamp`` changes with it."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
